"""One step of a recurrent layer, and a sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def _weights(gates: int, size: int) -> list[torch.Tensor]:
    shapes = [(gates * size, size), (gates * size, size), (gates * size,), (gates * size,)]
    return [torch.randn(shape) * size**-0.5 for shape in shapes]


@pytest.mark.parametrize("shape", [(1, 256), (1, 512), (1, 1024), (8, 512)], ids=str)
@pytest.mark.parametrize("cell", _GATES)
def test_step(race: Callable[..., None], cell: str, shape: tuple[int, int]) -> None:
    batch, size = shape
    weights = _weights(_GATES[cell], size)
    hidden = torch.randn(batch, size)
    state = (hidden, torch.randn(batch, size)) if cell == "lstm" else hidden
    moved = sum(weight.nbytes for weight in weights)
    race(f"{cell}_cell", torch.randn(batch, size), state, *weights, moved=moved)


@pytest.mark.parametrize("shape", [(1, 128, 512), (8, 64, 256)], ids=str)
@pytest.mark.parametrize("cell", _GATES)
def test_sequence(race: Callable[..., None], cell: str, shape: tuple[int, int, int]) -> None:
    batch, length, size = shape
    hidden = torch.randn(1, batch, size)
    state = (hidden, torch.randn(1, batch, size)) if cell == "lstm" else hidden
    race(cell, torch.randn(length, batch, size), state, _weights(_GATES[cell], size), error=1e-4)
