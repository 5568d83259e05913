"""Recurrent layers over sequences, padded and ragged, forward and with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.case import Case, require
from fastlm import nn

__all__ = ["cases", "infer", "train"]

# B, T, I, H, layers, whether lengths are spread evenly over 1..T, and the goals: forward, forward+backward.
_SHAPES: tuple[tuple[int, int, int, int, int, bool, float, float], ...] = (
    (1, 128, 512, 512, 1, False, 1.8, 2.0),
    (8, 128, 512, 512, 1, False, 1.0, 1.2),
    (20, 35, 650, 650, 2, False, 1.0, 1.2),
    (32, 128, 256, 256, 1, False, 1.0, 1.2),
    (64, 128, 1024, 1024, 1, False, 1.0, 1.2),
    (16, 128, 512, 512, 1, True, 4.0, 4.0),
    (32, 128, 512, 512, 1, True, 4.0, 4.0),
)
_OTHERS = tuple((*shape[:6], None, None) for shape in (_SHAPES[0], _SHAPES[3], _SHAPES[5]))  # of GRU and RNN


def _forward(module: torch.nn.Module, input: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The output's rows, h_n and, of an LSTM, c_n."""
    output, states = module(input if lengths is None else pack_padded_sequence(input, lengths))
    states = (states,) if isinstance(states, Tensor) else states
    return [output.data if isinstance(output, PackedSequence) else output, *states]


def infer(module: torch.nn.Module, input: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The results without gradients."""
    with torch.no_grad():
        return _forward(module, input, lengths)


def train(module: torch.nn.Module, input: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The results and the gradients of their sum, for weights that count as changed since the last time: as after an
    optimizer's step, nothing made of them may be used again."""
    for parameter in module.parameters():
        increment_version(parameter)
    leaf = input.detach().requires_grad_()
    results = _forward(module, leaf, lengths)
    total = torch.stack([result.sum() for result in results]).sum()
    return [*results, *torch.autograd.grad(total, [leaf, *module.parameters()])]


def _gate(work: Callable[..., list[Tensor]], ours: torch.nn.RNNBase, peer: torch.nn.RNNBase, *arguments: Any) -> None:
    input, lengths = arguments
    exact = type(peer)(peer.input_size, peer.hidden_size, peer.num_layers).double()  # type: ignore[arg-type]
    exact.load_state_dict(peer.state_dict())
    found = zip(work(ours, *arguments), work(peer, *arguments), work(exact, input.double(), lengths), strict=True)
    for position, (got, reference, want) in enumerate(found):
        bound = 2 * (reference.double() - want).abs().max() + 1e-6 * want.abs().max()
        require(bool((got.double() - want).abs().max() <= bound), f"{type(peer).__name__}: result {position} is wrong")


def _cases(kind: str, gates: int, shapes: Iterable[tuple[Any, ...]]) -> Iterator[Case]:
    for batch, steps, inputs, hidden, layers, ragged, *goals in shapes:
        torch.manual_seed(0)
        peer = getattr(torch.nn, kind)(inputs, hidden, layers)
        ours = getattr(nn, kind)(inputs, hidden, layers)
        ours.load_state_dict(peer.state_dict())
        lengths = torch.linspace(steps, 1, batch).round().long() if ragged else None
        arguments = torch.randn(steps, batch, inputs), lengths
        rows = batch * steps if lengths is None else int(lengths.sum())
        flops = 2.0 * gates * rows * hidden * (inputs + hidden + (layers - 1) * 2 * hidden)
        weights = 4.0 * gates * hidden * hidden * layers  # of h, read at every step
        shape = f"B {batch}, T {steps}, I {inputs}, H {hidden}"
        shape += f", {layers} layers" * (layers > 1) + ", lengths 1..T" * ragged
        works = ((f"{kind} forward", infer, 1, 1), (f"{kind} forward+backward", train, 2, 3))
        for (name, work, passes, products), goal in zip(works, goals, strict=True):
            yield Case(
                name=name,
                shape=shape,
                peer_name=f"torch.nn.{kind}",
                gate=partial(_gate, work, ours, peer, *arguments),
                ours=partial(work, ours, *arguments),
                peer=partial(work, peer, *arguments),
                goal=goal,
                moved=passes * steps * weights,
                resident=weights,
                flops=products * flops,
            )


def cases() -> Iterator[Case]:
    """fastlm.nn's recurrent layers against torch.nn's on the same weights."""
    yield from _cases("LSTM", 4, _SHAPES)
    yield from _cases("GRU", 3, _OTHERS)
    yield from _cases("RNN", 1, _OTHERS)
