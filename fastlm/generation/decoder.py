"""The generation loop: a ragged batch of prompts, one token a row at each step.

The first step reads the prompts. The second is recorded (`capture`), and from then on the steps are replayed natively,
until a row ends: the rest is then recorded again. Where a step cannot be recorded, it runs op by op. A single row's
tokens can be guessed ahead and confirmed several at a time (`speculative`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlm import ops
from fastlm.generation.batch import Batch
from fastlm.generation.capture import Captured, CaptureError, Refused
from fastlm.generation.draft import Draft, PromptLookup
from fastlm.generation.params import SamplingParams, as_ids
from fastlm.generation.speculative import Speculation
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.nn.state import KVCache
from fastlm.ops.registry import choosing

__all__ = ["Decoder", "FinishReason", "Token"]

FinishReason = Literal["stop", "length", "context"]
"""A stop token or stop string; max_new_tokens reached; the model's context is full."""

_PREFILL_CHUNK = 512  # tokens a prompt advances at a time: bounds the activations of a long prompt


@dataclass(frozen=True)
class Token:
    """One sampled token of one row."""

    row: int
    id: int
    logprob: float | None
    finish: FinishReason | None


class Decoder:
    """Generates for several prompts at once; `step()` samples tokens for every row that is still active.

    Prompts are read one by one and decoding uses kernels whose rows do not see each other, so a row's tokens do not
    depend on what else is in the batch, nor on its place in it. Rows that end leave the batch at once.

    Args:
        model: a causal language model. Its parameters must not change while it generates.
        prompts: token ids, one list a row, none empty.
        params: sampling options, the same for every row.
        stop_ids: tokens that end a row; they are returned as its last token.
        sequences: the random sequence of each row. Default: rows with the same prompt are numbered 0, 1, ... and so
            differ from each other, and a row's draws do not depend on the other prompts.
        capture: record the decode step and replay it where that is possible; False runs every step op by op.
        draft: guesses `params.draft_tokens` tokens ahead of a single row; default: prompt lookup.

    Raises:
        ValueError: a prompt is empty, has ids outside the vocabulary, or leaves no room in the model's context.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        stop_ids: Collection[int] = (),
        sequences: Sequence[int] | None = None,
        capture: bool = True,
        draft: Draft | None = None,
    ) -> None:
        self._prompts = as_ids(prompts)
        context = model.config.context_length
        for index, prompt in enumerate(self._prompts):
            if context is not None and len(prompt) > context:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, but the model's context holds {context}: shorten it"
                )
        self._model = model
        self._params = params.with_seed()
        self._stop_ids = frozenset(int(token) for token in stop_ids)
        sequences = list(sequences) if sequences is not None else _occurrences(self._prompts)
        if len(sequences) != len(self._prompts):
            raise ValueError(f"sequences: {len(sequences)} given for {len(self._prompts)} prompts")
        self._lengths = [len(prompt) for prompt in self._prompts]
        longest = max(self._lengths) + params.max_new_tokens
        self._context = longest if context is None else min(context, longest)
        self._generated = 0
        self._active = list(range(len(self._prompts)))
        self._bias = _dense_bias(self._params.logit_bias, model.config.vocab_size)
        # Stop tokens are out of the question at first where min_new_tokens says so.
        self._early_bias = self._bias
        if self._stop_ids and params.min_new_tokens:
            bias = torch.zeros(model.config.vocab_size) if self._bias is None else self._bias.clone()
            bias[sorted(self._stop_ids)] = -torch.inf
            self._early_bias = bias
        self._batch = Batch.start(
            self._prompts, sequences, history=longest if params.penalised else 0, device=model.device
        )
        self._state = model.make_state(len(self._prompts), self._context)
        self._captured: Captured | None = None
        self._why_not_captured: str | None = None if capture else "capture=False"
        self._draft = draft if draft is not None or not params.draft_tokens else PromptLookup()
        self._speculation: Speculation | None = None
        self._ids = [list(prompt) for prompt in self._prompts]

    @property
    def active(self) -> tuple[int, ...]:
        """Rows that have not ended."""
        return tuple(self._active)

    @property
    def seed(self) -> int:
        """The seed in use, for repeating a run whose seed was left to chance."""
        assert self._params.seed is not None
        return self._params.seed

    @property
    def why_not_captured(self) -> str | None:
        """Why steps run op by op; None where they are replayed, or none has been tried yet."""
        return self._why_not_captured

    def cancel(self, row: int) -> None:
        """Ends a row from outside (its stop string came): it takes no part in further steps."""
        if row in self._active:
            self._active.remove(row)

    @torch.inference_mode()
    def step(self, ahead: int = 1) -> list[Token]:
        """Samples the next token of every active row.

        Args:
            ahead: take up to so many steps at once, where nothing ends a row before: with fewer returns to Python.

        Returns:
            A token for each row in the order of `active`, step after step; nothing when all rows have ended.
        """
        if not self._active:
            return []
        if tuple(self._active) != self._batch.rows:
            self._batch = self._batch.keep(self._active)
            self._captured = self._speculation = None
        steps, logits = self._steps(ahead)
        tokens = []
        for at, ids in enumerate(steps):
            logprobs: list[float] | list[None] = [None] * len(ids)
            if self._params.logprobs:
                logprobs = _logprobs(logits if len(steps) == 1 else logits[at : at + 1], ids)
            self._generated += 1
            tokens += [self._accept(*triple) for triple in zip(self._active, ids, logprobs, strict=True)]
        ended = {token.row for token in tokens if token.finish}
        if ended:
            self._active = [row for row in self._active if row not in ended]
        if self._generated == self._params.min_new_tokens:
            self._captured = None  # it holds the bias against stop tokens
            if self._speculation is not None:
                self._speculation.forget()
        return tokens

    def _steps(self, ahead: int) -> tuple[list[list[int]], Tensor]:
        """The tokens of one or more steps, each [B], and the logits [B, V] of the last, or of several of one row."""
        if self._generated == 0:
            logits = self._prefill()
            tokens = self._sample(logits, self._batch)
            self._batch.feed(tokens)
            return [tokens.tolist()], logits
        if self._captured is None:
            logits, tokens = self._first_step()
            return [tokens.tolist()], logits
        if self._draft is not None and len(self._active) == 1 and isinstance(self._state, KVCache):
            found = self._guess()
            if found is not None:
                return found
            if self._speculation is not None and self._draft is not None:
                ahead = min(ahead, max(1, self._speculation.pace.waiting))
        start = time.perf_counter()
        steps = self._replay(1 if self._params.logprobs else min(ahead, self._steps_left()))
        if self._speculation is not None:
            self._speculation.pace.plain(time.perf_counter() - start, len(steps))
        return steps, self._captured.result[0]

    def _guess(self) -> tuple[list[list[int]], Tensor] | None:
        """Guessed tokens that proved right and the one after them; None where a plain step is the better choice."""
        row, count = self._active[0], self._params.draft_tokens
        if self._speculation is None:
            assert self._draft is not None
            self._speculation = Speculation(self._decode, self._batch, self._draft, count)
        speculation, ids = self._speculation, self._ids[row]
        if speculation.pace.waiting or self._steps_left() < count + 1:
            return None
        guesses = speculation.draft.propose(ids, count)
        if not guesses:
            return None
        restore = self._state.snapshot()
        try:
            tokens, logits = speculation.confirm(ids[-1], len(ids), guesses)
        except CaptureError:
            restore()
            self._draft = None
            return None
        ends = [at for at, token in enumerate(tokens) if token in self._stop_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        # The step has appended the last token and all guesses.
        assert isinstance(self._state, KVCache)
        self._state.lengths[row] -= count + 1 - len(tokens)
        for token in tokens:
            self._batch.feed(torch.tensor([token]))
        return [[token] for token in tokens], logits

    def _prefill(self) -> Tensor:
        rows = []
        for row in self._active:
            ids = torch.tensor([self._prompts[row]], dtype=torch.int64, device=self._model.device)
            state = self._state.row(row)
            for chunk in ids.split(_PREFILL_CHUNK, dim=1):
                hidden = self._model.hidden(chunk, state)
            rows.append(self._model.head(hidden[:, -1:])[:, -1])
        return torch.cat(rows)

    def _decode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Reads the batch's ids [B, T]: the logits [B T, V] behind each, and the tokens [B T] sampled from them."""
        logits = self._model.head(self._model.hidden(batch.ids, self._state, batch.index)).flatten(0, 1)
        return logits, self._sample(logits, batch)

    def _plain_step(self) -> tuple[Tensor, Tensor]:
        """A step of all active rows, which appends the tokens to them."""
        logits, tokens = self._decode(self._batch)
        self._batch.feed(tokens)
        return logits, tokens

    def _first_step(self) -> tuple[Tensor, Tensor]:
        """A step of this batch, recorded if it can be."""
        if self._why_not_captured is None:
            self._why_not_captured = self._obstacle()
        if self._why_not_captured is None:
            restore = self._state.snapshot()
            try:
                self._captured = Captured(self._plain_step, self._batch.ids)
                logits, tokens = self._captured.result
                return logits, tokens
            except CaptureError as error:
                self._why_not_captured = str(error)
                restore()
        return self._plain_step()

    def _obstacle(self) -> str | None:
        if native.CPU.module is None:
            return native.CPU.error
        if self._model.device.type != "cpu":
            return f"the model is on {self._model.device}"
        return None if choosing() else "a backend is forced"

    def _replay(self, times: int) -> list[list[int]]:
        assert self._captured is not None
        try:
            return self._captured.run(times, self._stop_ids)
        except Refused:
            self._sample(self._captured.result[0], self._batch)  # says what is wrong with the logits
            raise

    def _steps_left(self) -> int:
        """Steps before something must be looked at: at least 1."""
        limit = self._params.max_new_tokens - self._generated
        if self._generated < self._params.min_new_tokens:
            limit = self._params.min_new_tokens - self._generated
        return min(limit, self._context + 1 - max(self._lengths[row] for row in self._active))

    def _sample(self, logits: Tensor, batch: Batch) -> Tensor:
        params = self._params
        history: dict[str, Tensor] = {}
        if batch.history is not None:
            history = {
                "history": batch.history,
                "history_lengths": batch.positions,
                "prompt_lengths": batch.prompt_lengths,
            }
        return ops.sample(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=self._early_bias if self._generated < params.min_new_tokens else self._bias,
            seed=self.seed,
            sequence=batch.sequences,
            position=batch.positions,
            **history,
        )

    def _accept(self, row: int, token: int, logprob: float | None) -> Token:
        self._lengths[row] += 1
        self._ids[row].append(token)
        finish: FinishReason | None = None
        if token in self._stop_ids:
            finish = "stop"
        elif self._generated >= self._params.max_new_tokens:
            finish = "length"
        elif self._lengths[row] > self._context:
            finish = "context"
        return Token(row, token, logprob, finish)


def _logprobs(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Natural-log probabilities of one id for each row of logits [B, V]."""
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    found: list[float] = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
    return found


def _dense_bias(bias: Mapping[int, float] | None, vocab_size: int) -> Tensor | None:
    """The biases as a tensor [vocab_size], made once for all steps."""
    if not bias:
        return None
    outside = [token for token in bias if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"logit_bias: token {outside[0]} is outside the vocabulary of {vocab_size}")
    dense = torch.zeros(vocab_size)
    dense[list(bias)] = torch.tensor(list(bias.values()))
    return dense


def _occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many equal prompts stand before each one."""
    seen: dict[tuple[int, ...], int] = {}
    result = []
    for prompt in prompts:
        key = tuple(prompt)
        result.append(seen.get(key, 0))
        seen[key] = result[-1] + 1
    return result
