"""A ragged batch of prompts that all begin together: an `Engine` with a row for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fastlm.generation.draft import Draft
from fastlm.generation.engine import FinishReason, Token
from fastlm.generation.kept import Kept
from fastlm.generation.params import SamplingParams, as_ids
from fastlm.models.base import CausalLM

__all__ = ["Decoder", "FinishReason", "Token"]


class Decoder:
    """Generates for several prompts at once; `step()` samples tokens for every row that is still active.

    A row's tokens do not depend on what else is in the batch, nor on its place in it. Rows that end leave at once.

    Args:
        model: a causal language model. Its parameters must not change while it generates.
        prompts: token ids, one list a row, none empty.
        params: sampling options, the same for every row.
        stop_ids: tokens that end a row; they are returned as its last token.
        sequences: the random sequence of each row. Default: rows with the same prompt are numbered 0, 1, ... and so
            differ from each other, and a row's draws do not depend on the other prompts.
        capture: record the decode step and replay it where that is possible; False runs every step op by op.
        draft: guesses `params.draft_tokens` tokens ahead of a single row; None: `draft_model`, or prompt lookup.
        kv_dtype, draft_model: as for `Engine`.
        kept: where the engine comes from, and goes back to when all rows have ended; None: a new one.

    Raises:
        ValueError: `kv_dtype` or `draft_model` does not fit the model; a prompt is empty, has ids outside the
            vocabulary, or leaves no room in the model's context.
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
        kv_dtype: torch.dtype | None = None,
        draft_model: CausalLM | None = None,
        kept: Kept | None = None,
    ) -> None:
        rows = as_ids(prompts)
        context = model.config.context_length
        for index, prompt in enumerate(rows):
            if context is not None and len(prompt) > context:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, but the model's context holds {context}: shorten it"
                )
        params = params.with_seed()
        assert params.seed is not None
        self.seed: int = params.seed
        """The seed in use, for repeating a run whose seed was left to chance."""
        sequences = list(sequences) if sequences is not None else _occurrences(rows)
        if len(sequences) != len(rows):
            raise ValueError(f"sequences: {len(sequences)} given for {len(rows)} prompts")
        longest = max(len(prompt) for prompt in rows) + params.max_new_tokens
        self._kept = kept or Kept()
        self._engine = self._kept.take(
            model,
            rows=len(rows),
            max_length=longest if context is None else min(context, longest),
            stop_ids=stop_ids,
            capture=capture,
            kv_dtype=kv_dtype,
            draft_model=draft_model,
        )
        for prompt, sequence in zip(rows, sequences, strict=True):
            self._engine.submit(prompt, params, sequence=sequence, draft=draft)
        self._ended = False

    @property
    def active(self) -> tuple[int, ...]:
        """Rows that have not ended."""
        return () if self._ended else self._engine.active

    @property
    def why_not_captured(self) -> str | None:
        """Why steps run op by op; None where they are replayed, or none has been tried yet."""
        return self._engine.why_not_captured

    def cancel(self, row: int) -> None:
        """Ends a row from outside (its stop string came): it takes no part in further steps."""
        if not self._ended and row in self._engine.active:
            self._engine.cancel(row)
            self._give_back()

    def step(self, ahead: int = 1) -> list[Token]:
        """Samples the next token of every active row; arguments and result as of `Engine.step`."""
        tokens = [] if self._ended else self._engine.step(ahead)
        self._give_back()
        return tokens

    def _give_back(self) -> None:
        if not self._ended and not self._engine.active:
            self._ended = True
            self._kept.give(self._engine)


def _occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many equal prompts stand before each one."""
    seen: dict[tuple[int, ...], int] = {}
    result = []
    for prompt in prompts:
        key = tuple(prompt)
        result.append(seen.get(key, 0))
        seen[key] = result[-1] + 1
    return result
