"""The generation loop: a ragged batch of prompts, one token a row at each step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlm import ops
from fastlm.generation.params import SamplingParams, as_ids
from fastlm.models.base import CausalLM
from fastlm.ops.linear import FEW_ROWS

__all__ = ["Decoder", "FinishReason", "Token"]

FinishReason = Literal["stop", "length", "context"]
"""A stop token or stop string; max_new_tokens reached; the model's context is full."""

_PREFILL_CHUNK = 512  # tokens a prompt advances at a time: bounds the activations of a long prompt

# Rows decoded together. Beyond it `ops.linear` would turn to a matrix product, whose rows can differ in the last bit
# with their number; a group of this size already reads each weight once for many rows.
_GROUP = FEW_ROWS


@dataclass(frozen=True)
class Token:
    """One sampled token of one row."""

    row: int
    id: int
    logprob: float | None
    finish: FinishReason | None


class Decoder:
    """Generates for several prompts at once; `step()` samples one token for every row that is still active.

    Prompts are read one by one and decoding uses kernels whose rows do not see each other, so a row's tokens do not
    depend on what else is in the batch, nor on its place in it. Rows that end leave the batch at once.

    Args:
        model: a causal language model.
        prompts: token ids, one list a row, none empty.
        params: sampling options, the same for every row.
        stop_ids: tokens that end a row; they are returned as its last token.
        sequences: the random sequence of each row. Default: rows with the same prompt are numbered 0, 1, ... and so
            differ from each other, and a row's draws do not depend on the other prompts.

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
        self._device = model.device
        self._stop_ids = frozenset(int(token) for token in stop_ids)
        self._stop_index = torch.tensor(sorted(self._stop_ids), dtype=torch.int64, device=self._device)
        self._sequences = list(sequences) if sequences is not None else _occurrences(self._prompts)
        if len(self._sequences) != len(self._prompts):
            raise ValueError(f"sequences: {len(self._sequences)} given for {len(self._prompts)} prompts")
        self._lengths = [len(prompt) for prompt in self._prompts]
        longest = max(self._lengths) + params.max_new_tokens
        self._context = longest if context is None else min(context, longest)
        self._generated = [0] * len(self._prompts)
        self._last = [0] * len(self._prompts)
        self._active = list(range(len(self._prompts)))
        self._logit_bias = _dense_bias(self._params.logit_bias, model.config.vocab_size)
        self._history: Tensor | None = None
        if self._params.penalised:
            self._history = torch.zeros(len(self._prompts), longest, dtype=torch.int64)
            for row, prompt in enumerate(self._prompts):
                self._history[row, : len(prompt)] = torch.tensor(prompt)
        self._state = model.make_state(len(self._prompts), self._context)

    @property
    def active(self) -> tuple[int, ...]:
        """Rows that have not ended."""
        return tuple(self._active)

    @property
    def seed(self) -> int:
        """The seed in use, for repeating a run whose seed was left to chance."""
        assert self._params.seed is not None
        return self._params.seed

    def cancel(self, row: int) -> None:
        """Ends a row from outside (its stop string came): it takes no part in further steps."""
        if row in self._active:
            self._active.remove(row)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Samples the next token of every active row, in the order of `active`; an empty list when all have ended."""
        if not self._active:
            return []
        logits = self._prefill() if not any(self._generated) else self._decode()
        ids = self._sample(logits).tolist()
        logprobs: list[float] | list[None] = [None] * len(ids)
        if self._params.logprobs:
            chosen = torch.tensor(ids, device=logits.device)[:, None]
            logprobs = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
        tokens = [
            self._accept(row, token, logprob)
            for row, token, logprob in zip(list(self._active), ids, logprobs, strict=True)
        ]
        ended = {token.row for token in tokens if token.finish}
        if ended:
            self._active = [row for row in self._active if row not in ended]
        return tokens

    def _prefill(self) -> Tensor:
        rows = []
        for row in self._active:
            ids = torch.tensor([self._prompts[row]], dtype=torch.int64, device=self._device)
            state = self._state.row(row)
            for chunk in ids.split(_PREFILL_CHUNK, dim=1):
                hidden = self._model.hidden(chunk, state)
            rows.append(self._model.head(hidden[:, -1:])[:, -1])
        return torch.cat(rows)

    def _decode(self) -> Tensor:
        ids = torch.tensor([[self._last[row]] for row in self._active], dtype=torch.int64, device=self._device)
        everyone = len(self._active) == len(self._prompts)
        if everyone and len(self._active) <= _GROUP:
            return self._model.head(self._model.hidden(ids, self._state))[:, -1]
        parts = []
        for start in range(0, len(self._active), _GROUP):
            group = slice(start, start + _GROUP)
            parts.append(self._model.head(self._model.hidden(ids[group], self._state, self._active[group]))[:, -1])
        return torch.cat(parts)

    def _sample(self, logits: Tensor) -> Tensor:
        params, rows = self._params, self._active
        if self._stop_ids and params.min_new_tokens:
            early = [at for at, row in enumerate(rows) if self._generated[row] < params.min_new_tokens]
            if early:
                logits = logits.clone()
                logits[torch.tensor(early)[:, None], self._stop_index] = -torch.inf
        history: dict[str, Tensor] = {}
        if self._history is not None:
            everyone = len(rows) == len(self._prompts)
            history = {
                "history": self._history if everyone else self._history[rows],
                "history_lengths": torch.tensor([self._lengths[row] for row in rows]),
                "prompt_lengths": torch.tensor([len(self._prompts[row]) for row in rows]),
            }
        single = len(rows) == 1
        return ops.sample(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=self._logit_bias,
            seed=self.seed,
            sequence=self._sequences[rows[0]] if single else torch.tensor([self._sequences[row] for row in rows]),
            position=self._lengths[rows[0]] if single else torch.tensor([self._lengths[row] for row in rows]),
            **history,
        )

    def _accept(self, row: int, token: int, logprob: float | None) -> Token:
        if self._history is not None:
            self._history[row, self._lengths[row]] = token
        self._last[row] = token
        self._lengths[row] += 1
        self._generated[row] += 1
        finish: FinishReason | None = None
        if token in self._stop_ids:
            finish = "stop"
        elif self._generated[row] >= self._params.max_new_tokens:
            finish = "length"
        elif self._lengths[row] > self._context:
            finish = "context"
        return Token(row, token, logprob, finish)


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
