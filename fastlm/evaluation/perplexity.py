"""Perplexity and bits per byte of a text under a model, with every token scored exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import TokenFile, Tokens
from fastlm.models.base import CausalLM
from fastlm.nn.state import RecurrentState

if TYPE_CHECKING:
    from fastlm.generation.language_model import LanguageModel
    from fastlm.models.ngram import NGramLM

TokenSource: TypeAlias = TokenFile | np.ndarray | Tensor | Sequence[int]
"""Token ids in the order of the text, [N]."""

# A context of 8,192 takes gigabytes of attention weights, and changes the figure little.
_MAX_DEFAULT_BLOCK = 1024
_WINDOW_TOKENS = 4096
_NGRAM_CHUNK = 1 << 16


@dataclass(frozen=True)
class Result:
    """How well a model predicts a text.

    Attributes:
        loss: mean negative log-likelihood, in nats per token.
        tokens: how many tokens were scored.
        bytes: UTF-8 bytes of the text they stand for; None where not known.
    """

    loss: float
    tokens: int
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss), per token: comparable between models of one tokenizer only."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        """loss / ln 2."""
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for the whole text by its bytes: comparable between models of any tokenizer."""
        return self.bits_per_token * self.tokens / self.bytes if self.bytes else None


def evaluate(
    model: CausalLM | LanguageModel | NGramLM,
    tokens: TokenSource,
    *,
    block: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    max_batches: int | None = None,
    byte_count: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Result:
    """Scores every token of a text but the first, given those before it.

    A model with a limited context reads windows of `block` tokens, each `stride` further than the one before; only the
    last `stride` predictions of a window count (all of the first window), so each has at least `block - stride` tokens
    of context. A recurrent model reads the text as `batch` parallel streams and carries its state, so only the first
    token of each stream lacks context. An n-gram model reads it through.

    Args:
        model: put into `eval()` mode while it is evaluated.
        tokens: ids in the order of the text.
        block: tokens a window predicts; default: the context length, at most 1024, or 256 for a recurrent model.
        stride: default: half of `block`. Smaller is slower and closer to full context. Recurrent models need none.
        batch: windows (default: 4096 tokens; no effect on the result) or streams (default 1, the exact value) at a
            time.
        max_batches: stop early, after so many batches, always the same ones.
        byte_count: UTF-8 bytes of the scored text. Default: counted with the tokenizer, which is exact unless the
            tokenizer drops or replaces characters.
        tokenizer: default: the language model's own.

    Raises:
        ValueError: fewer than two tokens, or `block`, `stride`, `batch` or `max_batches` out of range.
    """
    if hasattr(model, "tokenizer"):
        language_model = cast("LanguageModel", model)
        tokenizer, model = tokenizer or language_model.tokenizer, language_model.model
    tokens = as_tokens("tokens", tokens, 2)  # one to predict from, one to predict
    for name, value in (("block", block), ("stride", stride), ("batch", batch), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")
    table = None if tokenizer is None or byte_count is not None else _byte_lengths(tokenizer)
    total, count, found_bytes = 0.0, 0, 0
    for nats, targets in _scores(model, tokens, block, stride, batch, max_batches):
        total += nats
        count += targets.numel()
        if table is not None:
            found_bytes += int(table[targets.cpu()].sum())
    return Result(total / count, count, found_bytes if table is not None else byte_count)


def _scores(
    model: CausalLM | NGramLM,
    tokens: Tokens,
    block: int | None,
    stride: int | None,
    batch: int | None,
    limit: int | None,
) -> Iterator[tuple[float, Tensor]]:
    """Pairs of (summed negative log-likelihood, the targets it is of)."""
    if not isinstance(model, CausalLM):
        yield from _ngram_scores(model, tokens)
        return
    context = model.config.context_length
    if context is not None and block is not None and block > context:
        raise ValueError(f"block: {block}, expected at most the model's context length ({context})")
    block = block or (256 if context is None else min(context, _MAX_DEFAULT_BLOCK))
    stride = stride or (block + 1) // 2
    if stride > block:
        raise ValueError(f"stride: {stride}, expected at most block ({block}): more would leave tokens out")
    state = None
    if context is None:
        state = model.make_state(min(batch or 1, len(tokens) - 1))
        assert isinstance(state, RecurrentState)
        batches = _streams(tokens, block, state.rows)
    else:
        batches = _windows(tokens, block, stride, batch or max(1, _WINDOW_TOKENS // block))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for index, (inputs, targets) in enumerate(batches):
                if index == limit:
                    break
                scored = targets[targets != -100]
                loss = model.loss(inputs.to(model.device), targets.to(model.device), state)
                yield loss.double().item() * scored.numel(), scored
    finally:
        model.train(training)


def _windows(tokens: Tokens, block: int, stride: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) [batch, block] of overlapping windows; targets that an earlier window scored are -100."""
    predictions = len(tokens) - 1
    block = min(block, predictions)
    ends = [*range(block, predictions, stride), predictions]
    for first in range(0, len(ends), batch):
        inputs, targets = [], []
        for index in range(first, min(first + batch, len(ends))):
            end = ends[index]
            row_ids = ids(tokens, end - block, end + 1)
            target = row_ids[1:].clone()
            if index:
                target[: block - (end - ends[index - 1])] = -100
            inputs.append(row_ids[:-1])
            targets.append(target)
        yield torch.stack(inputs), torch.stack(targets)


def _streams(tokens: Tokens, block: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) [rows, block] of `rows` consecutive parts of the text, read side by side.

    The last parts may be shorter: they are filled up with targets of -100, at their end, where no state matters.
    """
    predictions = len(tokens) - 1
    length = -(-predictions // rows)
    for start in range(0, length, block):
        width = min(block, length - start)
        inputs = torch.zeros(rows, width, dtype=torch.int64)
        targets = torch.full((rows, width), -100)
        for row in range(rows):
            begin = row * length + start
            end = min(begin + width, (row + 1) * length, predictions)
            if end > begin:
                row_ids = ids(tokens, begin, end + 1)
                inputs[row, : end - begin] = row_ids[:-1]
                targets[row, : end - begin] = row_ids[1:]
        yield inputs, targets


def _ngram_scores(model: NGramLM, tokens: Tokens) -> Iterator[tuple[float, Tensor]]:
    for start in range(1, len(tokens), _NGRAM_CHUNK):
        end = min(start + _NGRAM_CHUNK, len(tokens))
        begin = max(0, start - model.order + 1)  # the context of the chunk's first tokens
        part = ids(tokens, begin, end)
        scores = torch.as_tensor(model.log_probs(part))[start - begin - len(part) :]
        yield -float(scores.double().sum()), part[start - begin :]


def as_tokens(name: str, tokens: TokenSource, least: int) -> Tokens:
    """`tokens` as an array or tensor [N], N at least `least`; `name` is the argument's, for the `ValueError`."""
    if isinstance(tokens, TokenFile):
        tokens = tokens.tokens
    elif not isinstance(tokens, (np.ndarray, Tensor)):
        tokens = np.asarray(tokens)
    if tokens.ndim != 1 or _is_floating(tokens):
        raise ValueError(f"{name}: {tokens.dtype} {list(tokens.shape)}, expected integers in one dimension")
    if len(tokens) < least:
        raise ValueError(f"{name}: {len(tokens)} tokens, expected at least {least}")
    return tokens


def _is_floating(tokens: Tokens) -> bool:
    if isinstance(tokens, Tensor):
        return tokens.dtype.is_floating_point
    return not np.issubdtype(tokens.dtype, np.integer)


def ids(tokens: Tokens, start: int, end: int) -> Tensor:
    """tokens[start:end] as an int64 tensor on the CPU."""
    part = tokens[start:end]
    return part.to("cpu", torch.int64) if isinstance(part, Tensor) else torch.from_numpy(part.astype(np.int64))


def _byte_lengths(tokenizer: Tokenizer) -> Tensor:
    return torch.tensor([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
