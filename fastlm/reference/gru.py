"""Gated recurrent unit (Cho et al., 2014, https://arxiv.org/abs/1406.1078), the variant of cuDNN and torch.

The reset gate multiplies W_hn h + b_hn rather than h. Gates are stored in the order r, z, n.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import Noise, States, Weights, layer_of, sequence

__all__ = ["gru", "gru_cell"]


def gru_cell(
    input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step: n = tanh(x_n + r * h_n), h' = (1 - z) * n + z * h."""
    x_r, x_z, x_n = functional.linear(input, w_ih, b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = functional.linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (1 - z) * n + z * h


def _step(input: Tensor, states: States, weights: Weights, _: Noise) -> States:
    return (gru_cell(input, states[0], *weights[:4]),)


def gru(
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
    """The GRU over a sequence; arguments and results as in `reference.recurrent.sequence`."""
    return sequence(
        layer_of(_step),
        input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
    )  # fmt: skip
