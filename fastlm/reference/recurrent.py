"""What LSTM, GRU and RNN sequences have in common: the loops over time, directions and layers, and the variants.

Three variants, which combine freely, change an LSTM or a GRU:

- layer normalisation (Ba et al., 2016, https://arxiv.org/abs/1607.06450): of W_ih x and of W_hh h, each over all gates
  together, the shifts being the biases b_ih and b_hh; in an LSTM also of c on its way to h.
- variational recurrent dropout (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287): h is multiplied by one mask
  for the whole sequence before W_hh.
- zoneout (Krueger et al., 2017, https://arxiv.org/abs/1606.01305): elements of the states stay as they were, at random
  in training, by expectation elsewhere.

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

__all__ = [
    "NORMAL",
    "NORM_EPS",
    "Layer",
    "Noise",
    "States",
    "Step",
    "Weights",
    "affine",
    "draw_noise",
    "keep",
    "layer_of",
    "normalised",
    "sequence",
    "split_weights",
]

NORM_EPS = 1e-5
"""Added to the variance in layer normalisation, as torch's default."""

States = tuple[Tensor, ...]
"""The hidden state first ([B, P], what a layer puts out); for an LSTM the cell state ([B, H]) after it."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction, named as in torch. G gates: 4 LSTM, 3 GRU, 1 RNN."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H], LSTM with projection; without it P = H
    # LSTM and GRU with layer normalisation
    ln_ih: Tensor | None = None  # [G*H], gain of W_ih x
    ln_hh: Tensor | None = None  # [G*H], gain of W_hh h
    ln_c: Tensor | None = None  # [H], gain of c, LSTM
    ln_c_bias: Tensor | None = None  # [H], LSTM with the other biases


class Noise(NamedTuple):
    """What one layer in one direction drops or keeps, drawn beforehand; None where it does not."""

    dropout: Tensor | None = None  # [B, P]: multiplies h before W_hh, the same at every step
    # Shares of the old state kept at a step: zeros and ones in training, elsewhere their expectation.
    zoneout_h: Tensor | None = None  # [N, P]
    zoneout_c: Tensor | None = None  # [N, H], LSTM

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


def normalised(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer normalisation over the last dimension; without a gain, nothing."""
    return x if gain is None else functional.layer_norm(x, gain.shape, gain, bias, NORM_EPS)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """W x + b, or with a gain N(W x) + b."""
    if gain is None:
        return functional.linear(x, weight, bias)
    return normalised(functional.linear(x, weight), gain, bias)


def keep(new: Tensor, old: Tensor, share: Tensor | None) -> Tensor:
    """Zoneout: `share` of the old."""
    return new if share is None else new + share * (old - new)


def draw_noise(
    rows: int,
    states: States,
    recurrent_dropout: float,
    zoneout: Sequence[float],
    training: bool,
) -> Noise:
    """Draws from torch's generator; nothing is drawn outside of training.

    Args:
        rows: N, of the input over all steps.
        states: h0 [layers * directions, B, P] and, of an LSTM, c0 [layers * directions, B, H].
        recurrent_dropout: probability of zeroing an element of h; what is left is scaled by 1 / (1 - p).
        zoneout: of each state, the probability of keeping an element.

    Returns:
        Noise of all layers and directions, which are the first dimension.
    """
    h = states[0]

    def shares(state: Tensor, p: float) -> Tensor | None:
        if not p:
            return None
        size = (state.shape[0], rows, state.shape[2])
        if not training:
            return h.new_full((), p).expand(size)
        # Twice as fast as bernoulli_. In float32, since the numbers that half precision can tell apart are too few.
        return h.new_empty(size, dtype=torch.float32).uniform_().lt_(p).to(h.dtype)

    mask = functional.dropout(torch.ones_like(h), recurrent_dropout) if recurrent_dropout and training else None
    return Noise(mask, *map(shares, states, zoneout))


def split_weights(
    weights: Sequence[Tensor], bias: bool, projected: bool, layer_norm: bool = False, cells: bool = True
) -> list[Weights]:
    """Torch's flat list (layer 0, layer 0 reverse, layer 1, ...) as one Weights each, in the order of its fields.

    `cells`: there are cell states, which layer normalisation has parameters for.
    """
    norm_of_c = layer_norm and cells
    present = (True, True, bias, bias, projected, layer_norm, layer_norm, norm_of_c, norm_of_c and bias)
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
    cells = len(states) == 2
    plain = 2 + 2 * bias + (2 + (1 + bias) * cells) * layer_norm
    groups = split_weights(weights, bias, len(weights) != num_layers * directions * plain, layer_norm, cells)
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
