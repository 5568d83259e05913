"""What LSTM, GRU and RNN sequences have in common: the loops over time, directions and layers.

Rows of a batch may differ in length. As in torch's PackedSequence, the input is then [N, I], the rows of time 0 first,
those of time 1 next, and so on; `batch_sizes[t]` rows are still running at time t, and they are always the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Layer", "States", "Step", "Weights", "layer_of", "sequence", "split_weights"]

States = tuple[Tensor, ...]
"""The hidden state first ([B, P], what a layer puts out); for an LSTM the cell state ([B, H]) after it."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction, named as in torch. G gates: 4 LSTM, 3 GRU, 1 RNN."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H], LSTM with projection; without it P = H


Step = Callable[[Tensor, States, Weights], States]
"""One step of a cell: (input [B, I], states, weights) -> states."""

Layer = Callable[[Tensor, list[int], States, Weights, bool], tuple[Tensor, States]]
"""One layer in one direction: (input [N, I], batch_sizes, states, weights, reverse) -> (output [N, P], states)."""


def split_weights(weights: Sequence[Tensor], bias: bool, projected: bool) -> list[Weights]:
    """Torch's flat list (layer 0, layer 0 reverse, layer 1, ...) as one Weights each."""
    size = 2 + 2 * bias + projected
    groups = []
    for start in range(0, len(weights), size):
        w_ih, w_hh, *rest = weights[start : start + size]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        groups.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None))
    return groups


def layer_of(step: Step) -> Layer:
    """The layer that takes `step` at each time, from the last time to the first where `reverse`.

    A row's state stays as it is where the row is not running: after its end, or in reverse before its last element.
    """

    def layer(
        input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool
    ) -> tuple[Tensor, States]:
        starts = list(accumulate(batch_sizes, initial=0))
        outputs = []
        for t in reversed(range(len(batch_sizes))) if reverse else range(len(batch_sizes)):
            running = batch_sizes[t]
            new = step(input[starts[t] : starts[t + 1]], tuple(s[:running] for s in states), weights)
            states = tuple(torch.cat([n, s[running:]]) for n, s in zip(new, states, strict=True))
            outputs.append(new[0])
        return torch.cat(outputs[::-1] if reverse else outputs), states

    return layer


def sequence(
    layer: Layer,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    dropout: float,
) -> tuple[Tensor, States]:
    """Runs `layer` over all layers and directions.

    Args:
        layer: what one layer does in one direction.
        input: [T, B, I], [B, T, I] where batch_first, or [N, I] with batch_sizes.
        states: each [num_layers * directions, B, ...], layer 0, layer 0 reverse, layer 1, ...
        weights: flat, in the same order.
        batch_sizes: int64 [T] on the CPU, or None.
        dropout: probability with which an element of each layer's output but the last's is zeroed; 0 for inference.

    Returns:
        The last layer's output, like `input` with directions * P in the last dimension (forward, then reverse), and
        the final states, like `states`.
    """
    directions = 2 if bidirectional else 1
    steps: tuple[int, int] | None = None
    if batch_sizes is None:
        if batch_first:
            input = input.transpose(0, 1)
        steps = (input.shape[0], input.shape[1])
        sizes = [steps[1]] * steps[0]
        input = input.reshape(-1, input.shape[-1])
    else:
        sizes = batch_sizes.tolist()
    groups = split_weights(weights, bias, projected=len(weights) != num_layers * directions * (2 + 2 * bias))
    finals: list[States] = []
    for index in range(num_layers):
        if index and dropout:
            input = functional.dropout(input, dropout)
        outputs = []
        for direction in range(directions):
            position = index * directions + direction
            output, final = layer(input, sizes, tuple(s[position] for s in states), groups[position], direction == 1)
            outputs.append(output)
            finals.append(final)
        input = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    if steps is not None:
        input = input.view(*steps, input.shape[-1])
        if batch_first:
            input = input.transpose(0, 1)
    return input, tuple(s[0].unsqueeze(0) if len(s) == 1 else torch.stack(s) for s in zip(*finals, strict=True))
