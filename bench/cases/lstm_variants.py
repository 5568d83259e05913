"""LSTM and GRU layers with layer normalisation, recurrent dropout and zoneout, and LSTMs in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, require
from bench.cases.lstm import infer, train
from fastlm import nn, ops

__all__ = ["VARIANTS", "cases", "gate", "loop"]

VARIANTS: dict[str, dict[str, Any]] = {
    "layer_norm": {"layer_norm": True},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.1},
    "all three": {"layer_norm": True, "recurrent_dropout": 0.3, "zoneout": 0.1},
}
_SHAPES = ((1, 128, 512), (16, 128, 512), (32, 128, 256))  # B, T, I = H
_NOT_SLOW = 0.8  # of the plain layer's speed
_BFLOAT_SHAPES = ((1, 1, 512), (1, 1, 1024), (1, 128, 512), (4, 64, 512))


_Work = Callable[..., list[Tensor]]


def loop(module: nn.LSTM | nn.GRU, input: Tensor, lengths: None, work: _Work = train) -> list[Tensor]:
    """What one writes in PyTorch today: the same steps as PyTorch operations, one after the other."""
    with ops.backend("reference"):
        return work(module, input, lengths)


def _agree(name: str, found: list[Tensor], want: list[Tensor], bound: float) -> None:
    for position, (a, b) in enumerate(zip(found, want, strict=True)):
        error = (a.double() - b.double()).abs().max()
        require(bool(error <= bound * b.double().abs().max()), f"{name}: result {position} is wrong")


def gate(module: nn.LSTM | nn.GRU, input: Tensor, work: _Work = train) -> None:
    # Normalisation makes the LSTM's recurrence chaotic: what float32 loses doubles every 16 steps, here as in PyTorch,
    # and at the 128th is a thousandth. (A GRU forgets it.)
    start = input[:32]
    torch.manual_seed(1)
    want = loop(module, start, None, work)
    torch.manual_seed(1)  # the same noise
    _agree("recurrent variant", work(module, start, None), want, 1e-4)


def _bfloat_gate(work: _Work, ours: nn.LSTM, wide: nn.LSTM, input: Tensor) -> None:
    _agree("LSTM in bfloat16", work(ours, input.bfloat16(), None), work(wide, input, None), 0.05)


def _variants(kind: type[nn.LSTM] | type[nn.GRU]) -> Iterator[Case]:
    for batch, steps, size in _SHAPES:
        torch.manual_seed(0)
        input = torch.randn(steps, batch, size)
        plain = kind(size, size)
        for name, options in VARIANTS.items():
            for of, work in (("forward", infer), ("forward+backward", train)):
                if work is infer and name == "recurrent_dropout":
                    continue  # which is off then
                module = kind(size, size, **options).train(work is train)
                peers = {"the loop in PyTorch": partial(loop, module, input, None, work)}
                without = f"fastlm.nn.{kind.__name__} without"
                peers[without] = partial(work, plain, input, None)
                for peer_name, peer in peers.items():
                    yield Case(
                        name=f"{kind.__name__} variant {of}",
                        shape=f"B {batch}, T {steps}, I {size}, H {size}, {name}",
                        peer_name=peer_name,
                        gate=partial(gate, module, input, work),
                        ours=partial(work, module, input, None),
                        peer=peer,
                        goal=_NOT_SLOW if peer_name == without else None,
                    )


def _bfloat() -> Iterator[Case]:
    for batch, steps, size in _BFLOAT_SHAPES:
        torch.manual_seed(0)
        ours = nn.LSTM(size, size).bfloat16()
        peer = torch.nn.LSTM(size, size).bfloat16()
        peer.load_state_dict(ours.state_dict())
        wide = nn.LSTM(size, size)
        wide.load_state_dict(ours.state_dict())
        input = torch.randn(steps, batch, size).bfloat16().float()
        for name, work in (("forward", infer), ("forward+backward", train)):
            if steps == 1 and work is train:
                continue
            for peer_name, module, given in (
                ("torch.nn.LSTM, bfloat16", peer, input.bfloat16()),
                ("fastlm.nn.LSTM, float32", wide, input),
            ):
                yield Case(
                    name=f"LSTM bfloat16 {name}",
                    shape=f"B {batch}, T {steps}, I {size}, H {size}",
                    peer_name=peer_name,
                    gate=partial(_bfloat_gate, work, ours, wide, input),
                    ours=partial(work, ours, input.bfloat16(), None),
                    peer=partial(work, module, given, None),
                )


def cases() -> Iterator[Case]:
    """Variants against the loop in PyTorch and the plain layer; bfloat16 against torch's and float32."""
    yield from _variants(nn.LSTM)
    yield from _variants(nn.GRU)
    yield from _bfloat()
