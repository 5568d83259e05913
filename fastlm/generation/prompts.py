"""Short prompts, and what is left of longer ones where an engine knows their beginning, read by recorded steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.generation.capture import Captured, CaptureError
from fastlm.models.base import CausalLM
from fastlm.nn.state import KVCache
from fastlm.reference.linear import FEW_TOKENS

__all__ = ["ShortPrompts"]

_WIDTHS = (FEW_TOKENS // 2, FEW_TOKENS)
"""Tokens that the recorded steps read; fewer are padded. For up to `FEW_TOKENS` the kernels give each token the bits
that it has whatever follows, so that a prompt's do not depend on whether a recorded step has read it."""


class ShortPrompts:
    """Reads the tokens that a sequence begins with, or goes on with, up to `FEW_TOKENS` at once.

    Op by op most of that time is Python's: for a model of 30 layers some 8 ms, of 20. A width is recorded when it is
    wanted a second time, so that an engine for one text never pays for it.

    Args:
        model, state: what a step runs; a CPU's.
    """

    def __init__(self, model: CausalLM, state: KVCache) -> None:
        self._model, self._state = model, state
        self._seen: set[int] = set()
        self._steps: dict[int, _Step] = {}
        self._refused = False

    def read(self, ids: Sequence[int], row: int) -> tuple[Tensor, Tensor] | None:
        """Reads `ids` behind what the state's row holds, where a recorded step can.

        Returns:
            The hidden states [1, len(ids), d], until the next call, and the logits [1, V] behind the last one. None:
            there is no such step, and nothing has been read.
        """
        count = len(ids)
        width = next((width for width in _WIDTHS if width >= count), None)
        known = int(self._state.lengths[row])
        if width is None or known + width > self._state.max_length or self._refused:
            return None
        if width not in self._seen:
            self._seen.add(width)
            return None
        try:
            hidden, logits = self._run(width, ids, row)
        except CaptureError:
            self._refused = True
            return None
        finally:
            self._state.lengths[row] = known
        self._state.lengths[row] = known + count  # the rest was padding
        return hidden[:, :count], logits.clone()

    def _run(self, width: int, ids: Sequence[int], row: int) -> tuple[Tensor, Tensor]:
        step = self._steps.get(width)
        if step is not None:
            step.fill(ids, row)
            step.captured.run(1)
        else:
            step = _Step(self._model, self._state, width, ids, row)
            self._steps[width] = step
        return step.hidden, step.logits


class _Step:
    """The recorded step of one width. CaptureError: it cannot be recorded; it may have run in part."""

    def __init__(self, model: CausalLM, state: KVCache, width: int, ids: Sequence[int], row: int) -> None:
        self._ids = torch.zeros(1, width, dtype=torch.int64)
        self._row, self._last = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
        self.fill(ids, row)

        def forward() -> tuple[Tensor, Tensor]:
            hidden = model.hidden(self._ids, state, self._row)
            last = hidden[0].index_select(0, self._last)
            return hidden, model.head(last[:, None])[:, 0]

        self.captured = Captured(forward, self._last)
        self.hidden, self.logits = self.captured.result

    def fill(self, ids: Sequence[int], row: int) -> None:
        """Takes over what to read, and into which row of the state."""
        padding = [ids[-1]] * (self._ids.shape[1] - len(ids))
        self._ids.copy_(torch.tensor([[*ids, *padding]]))
        self._row.fill_(row)
        self._last.fill_(len(ids) - 1)
