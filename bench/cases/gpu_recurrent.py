"""LSTMs and GRUs on a GPU, float32: steps and sequences against cuDNN's; what it lacks against the loop in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
from bench.case import Case
from bench.cases import lstm, lstm_variants
from bench.gpu import live

__all__ = ["cases"]

_VARIANT_SHAPES = ((1, 128, 512), (32, 128, 512), (32, 128, 1024))
_SHAPES = ((1, 1, 512), (1, 1, 1024), (16, 1, 1024), (1, 128, 512), (32, 128, 512), (32, 128, 1024))


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """(batch, steps, width): single steps, then sequences, then variants."""
    for batch, steps, width in ((2, 1, 16), (2, 5, 16)) if small else _SHAPES:
        for backward in (False,) if steps == 1 else (False, True):
            yield _case(batch, steps, width, backward, device)
    for batch, steps, width in ((2, 5, 16),) if small else _VARIANT_SHAPES:
        for kind in ("LSTM", "GRU"):
            for name, options in lstm_variants.VARIANTS.items():
                yield _variant(kind, name, options, batch, steps, width, device)


def _variant(kind: str, name: str, options: dict[str, Any], batch: int, steps: int, width: int, device: str) -> Case:
    torch.manual_seed(0)
    module = getattr(fastlm.nn, kind)(width, width, **options).to(device)
    x = torch.randn(steps, batch, width, device=device)
    elements = sum(p.numel() for p in module.parameters())
    return Case(
        name=f"{kind} variant, float32, forward+backward",
        shape=f"batch {batch}, {steps} steps, width {width}, {name}",
        peer_name="the loop in PyTorch",
        gate=lambda: lstm_variants.gate(module, x),
        ours=lambda: lstm.train(module, x, None),
        peer=lambda: lstm_variants.loop(module, x, None),
        moved=4.0 * elements,
        flops=6.0 * elements * batch * steps,
        device=device,
    )


def _case(batch: int, steps: int, width: int, backward: bool, device: str) -> Case:
    torch.manual_seed(0)
    theirs = nn.LSTM(width, width).to(device)
    ours = fastlm.nn.LSTM(width, width).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = live.rounded(steps, batch, width, device=device, dtype=torch.float32, grad=backward)

    def run(module: nn.Module, input: Tensor) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [module(input)[0]]
        out = module(input)[0]
        weights = [input, *module.parameters()]
        return [out.detach(), *torch.autograd.grad(out, weights, torch.ones_like(out))]

    def exact() -> list[Tensor]:
        wide = nn.LSTM(width, width).to(device).double()
        wide.load_state_dict(theirs.state_dict())
        with torch.backends.cudnn.flags(enabled=False):
            return run(wide, x.detach().double().requires_grad_(backward))

    elements = sum(p.numel() for p in theirs.parameters())
    return Case(
        name=f"LSTM, float32, {'forward+backward' if backward else 'forward'}",
        shape=f"batch {batch}, {steps} steps, width {width}",
        peer_name="cuDNN (nn.LSTM)",
        gate=live.gate(lambda: run(ours, x), lambda: run(theirs, x), exact),
        ours=lambda: run(ours, x),
        peer=live.peer("nn.LSTM", lambda: run(theirs, x)),
        moved=4.0 * elements,
        flops=(6.0 if backward else 2.0) * elements * batch * steps,
        device=device,
    )
