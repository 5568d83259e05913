"""Gated recurrent unit (Cho et al., 2014, https://arxiv.org/abs/1406.1078), the variant of cuDNN and torch.

The reset gate multiplies W_hn h + b_hn rather than h. Gates are stored in the order r, z, n. The variants are those of
`reference.recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlm.reference.recurrent import NORMAL, Noise, States, Weights, affine, keep, layer_of, sequence

__all__ = ["gru", "gru_cell"]


def gru_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    ln_ih: Tensor | None = None,
    ln_hh: Tensor | None = None,
    noise: Noise = NORMAL,
) -> Tensor:
    """One step: n = tanh(x_n + r * h_n), h' = (1 - z) * n + z * h.

    With variants, N being layer normalisation, m the dropout mask, z_h the share of zoneout: x is N(W_ih x) + b_ih and
    h_r, h_z, h_n are N(W_hh (m * h)) + b_hh; h~ = (1 - z) * n + z * h, h' = h~ + z_h * (h - h~).
    """
    x_r, x_z, x_n = affine(input, w_ih, b_ih, ln_ih).chunk(3, dim=-1)
    recurrent = h if noise.dropout is None else noise.dropout * h
    h_r, h_z, h_n = affine(recurrent, w_hh, b_hh, ln_hh).chunk(3, dim=-1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return keep((1 - z) * n + z * h, h, noise.zoneout_h)


def _step(input: Tensor, states: States, weights: Weights, noise: Noise) -> States:
    return (gru_cell(input, states[0], *weights[:4], weights.ln_ih, weights.ln_hh, noise),)


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
    layer_norm: bool = False,
    dropout_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
) -> tuple[Tensor, States]:
    """The GRU over a sequence; arguments and results as in `reference.recurrent.sequence`.

    The last two are `Noise`, with layers and directions as the first dimension.
    """
    return sequence(
        layer_of(_step),
        input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
        layer_norm, Noise(dropout_mask, zoneout_h),
    )  # fmt: skip
