"""The rows that are being decoded together, as tensors that a decode step reads and updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm import ops

__all__ = ["Batch"]


@dataclass
class Batch:
    """Some rows of a state, and where each stands.

    Attributes:
        rows: their numbers in the state.
        index: the same as int64 [B], or None where they are all of its rows in order.
        ids: int64 [B, 1], each row's last token, on the model's device. The other tensors are on the CPU.
        positions: int64 [B], tokens so far, prompt included: the position of the next one.
        sequences: int64 [B], which random sequence each row is.
        prompt_lengths: int64 [B].
        history: int64 [B, L], all tokens so far, where the sampler wants them.
    """

    rows: tuple[int, ...]
    index: Tensor | None
    ids: Tensor
    positions: Tensor
    sequences: Tensor
    prompt_lengths: Tensor
    history: Tensor | None
    _ends: Tensor = field(init=False)

    def __post_init__(self) -> None:
        longest = 0 if self.history is None else self.history.shape[1]
        # Where in the flat history each row's next token goes.
        self._ends = torch.arange(len(self.rows)) * longest + self.positions

    @classmethod
    def start(
        cls, prompts: Sequence[Sequence[int]], sequences: Sequence[int], *, history: int, device: torch.device
    ) -> Batch:
        """All rows, their prompts read; `history` is the number of tokens to make room for, 0: none."""
        held = None
        if history:
            held = torch.zeros(len(prompts), history, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                held[row, : len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)
        return cls(tuple(range(len(prompts))), None, ids, lengths, torch.tensor(sequences), lengths.clone(), held)

    def keep(self, rows: Sequence[int]) -> Batch:
        """Those of its rows, in memory of their own."""
        at = torch.tensor([self.rows.index(row) for row in rows])
        history = None if self.history is None else self.history[at]
        tensors = self.positions[at], self.sequences[at], self.prompt_lengths[at]
        return Batch(tuple(rows), torch.tensor(rows), self.ids[at.to(self.ids.device)], *tensors, history)

    def feed(self, tokens: Tensor) -> None:
        """Appends a token to every row: int64 [B] on the model's device."""
        ops.offset(tokens, out=self.ids.view(-1))
        if self.history is not None:
            ops.offset(tokens.cpu(), out=self.history.view(-1), out_index=self._ends)
        ops.offset(self._ends, 1, out=self._ends)
        ops.offset(self.positions, 1, out=self.positions)
