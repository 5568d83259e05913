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

__all__ = ["NORMAL", "Layer", "Noise", "States", "Step", "Weights", "layer_of", "sequence", "split_weights"]

States = tuple[Tensor, ...]
"""The hidden state first ([B, P], what a layer puts out); for an LSTM the cell state ([B, H]) after it."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction, named as in torch. G gates: 4 LSTM, 3 GRU, 1 RNN."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H], LSTM with projection; without it P = H
    # LSTM with layer normalisation
    ln_ih: Tensor | None = None  # [4H], gain of W_ih x
    ln_hh: Tensor | None = None  # [4H], gain of W_hh h
    ln_c: Tensor | None = None  # [H], gain of c
    ln_c_bias: Tensor | None = None  # [H], with the other biases


class Noise(NamedTuple):
    """What one layer in one direction drops or keeps, drawn beforehand; None where it does not."""

    dropout: Tensor | None = None  # [B, P]: multiplies h before W_hh, the same at every step
    # Shares of the old state kept at a step: zeros and ones in training, elsewhere their expectation.
    zoneout_h: Tensor | None = None  # [N, P]
    zoneout_c: Tensor | None = None  # [N, H]

    def of_layer(self, position: int) -> Noise:
        """That of one layer in one direction, where the tensors have those as their first dimension."""
        return Noise(*(None if t is None else t[position] for t in self))

    def of_step(self, start: int, stop: int) -> Noise:
        """That of the step with the rows from start to stop, the first ones of the batch."""
        return Noise(
            None if self.dropout is None else self.dropout[: stop - start],
            *(None if t is None else t[start:stop] for t in self[1:]),
        )


NORMAL = Noise()

Step = Callable[[Tensor, States, Weights, Noise], States]
"""One step of a cell: (input [B, I], states, weights, noise of the step) -> states."""

Layer = Callable[[Tensor, list[int], States, Weights, bool, Noise], tuple[Tensor, States]]
"""One layer, one direction: (input [N, I], batch_sizes, states, weights, reverse, noise) -> (output [N, P], states)."""


def split_weights(weights: Sequence[Tensor], bias: bool, projected: bool, layer_norm: bool = False) -> list[Weights]:
    """Torch's flat list (layer 0, layer 0 reverse, layer 1, ...) as one Weights each, in the order of its fields."""
    present = (True, True, bias, bias, projected, layer_norm, layer_norm, layer_norm, layer_norm and bias)
    size = sum(present)
    groups = []
    for start in range(0, len(weights), size):
        given = iter(weights[start : start + size])
        groups.append(Weights(*(next(given) if p else None for p in present)))  # type: ignore[arg-type]
    return groups


def layer_of(step: Step) -> Layer:
    """The layer that takes `step` at each time, from the last time to the first where `reverse`.

    A row's state stays as it is where the row is not running: after its end, or in reverse before its last element.
    """

    def layer(
        input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, noise: Noise
    ) -> tuple[Tensor, States]:
        starts = list(accumulate(batch_sizes, initial=0))
        outputs = []
        for t in reversed(range(len(batch_sizes))) if reverse else range(len(batch_sizes)):
            running = batch_sizes[t]
            now = tuple(s[:running] for s in states)
            of_step = noise.of_step(starts[t], starts[t + 1])
            new = step(input[starts[t] : starts[t + 1]], now, weights, of_step)
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
    layer_norm: bool = False,
    noise: Noise = NORMAL,
) -> tuple[Tensor, States]:
    """Runs `layer` over all layers and directions.

    Args:
        layer: what one layer does in one direction.
        input: [T, B, I], [B, T, I] where batch_first, or [N, I] with batch_sizes.
        states: each [num_layers * directions, B, ...], layer 0, layer 0 reverse, layer 1, ...
        weights: flat, in the same order.
        batch_sizes: int64 [T] on the CPU, or None.
        dropout: probability with which an element of each layer's output but the last's is zeroed; 0 for inference.
        layer_norm: whether `weights` has those of layer normalisation.
        noise: its tensors with a first dimension of layers and directions, as in `states`.

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
    plain = 2 + 2 * bias + (3 + bias) * layer_norm
    groups = split_weights(weights, bias, len(weights) != num_layers * directions * plain, layer_norm)
    finals: list[States] = []
    for index in range(num_layers):
        if index and dropout:
            input = functional.dropout(input, dropout)
        outputs = []
        for direction in range(directions):
            position = index * directions + direction
            start = tuple(s[position] for s in states)
            output, final = layer(input, sizes, start, groups[position], direction == 1, noise.of_layer(position))
            outputs.append(output)
            finals.append(final)
        input = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    if steps is not None:
        input = input.view(*steps, input.shape[-1])
        if batch_first:
            input = input.transpose(0, 1)
    return input, tuple(s[0].unsqueeze(0) if len(s) == 1 else torch.stack(s) for s in zip(*finals, strict=True))
