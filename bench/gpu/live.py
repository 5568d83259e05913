"""What the cases of `python -m bench gpu` share: the gate against float64, and peers that may be absent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.case import GateFailed, require
from bench.worker import OURS, EngineError

__all__ = ["gate", "peer", "rounded"]

Tensors = Tensor | Sequence[Tensor]


def _list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def gate(ours: Callable[[], Tensors], same: Callable[[], Tensors], exact: Callable[[], Tensors]) -> Callable[[], str]:
    """A gate: each of our results may be off what float64 gives by twice what PyTorch in our dtype is, in norm and at
    the worst place, plus a millionth of the result's magnitude."""

    def judge() -> str:
        try:
            got = _list(ours())
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise GateFailed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        worst = 0.0
        for at, (g, r, w) in enumerate(zip(got, _list(same()), _list(exact()), strict=True)):
            g, r, w = (t.detach().double().cpu() for t in (g, r, w))
            for name, size in (("largest", _largest), ("mean", _mean)):
                off, bound = size(g - w), 2 * size(r - w) + 1e-6 * size(w)
                require(off <= bound, f"result {at}: {name} error {off:.1e}, allowed {bound:.1e}")
                worst = max(worst, off / bound)
        return f"within {worst:.0%} of the bound, twice PyTorch's own error"

    return judge


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _mean(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def peer(name: str, work: Callable[[], object]) -> Callable[[], object]:
    """The same work; whatever keeps the peer from doing it makes a row that says so."""

    @functools.wraps(work)
    def run() -> object:
        try:
            return work()
        except (ImportError, RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
            assert name != OURS
            raise EngineError(
                name, f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
            ) from error

    return run


def rounded(*shape: int, device: str, dtype: torch.dtype, grad: bool = False, seed: int = 0, **scale: Any) -> Tensor:
    """Normal numbers, rounded to `dtype`, so that float64 can start from the same ones. `scale` multiplies them."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(*shape, generator=generator, device=device) * scale.get("times", 1.0)
    return values.to(dtype).requires_grad_(grad)
