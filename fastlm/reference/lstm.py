"""Long short-term memory (Hochreiter & Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735).

With the forget gate of Gers et al., 2000, and the projection of Sak et al., 2014, https://arxiv.org/abs/1402.1128;
no peepholes. Gates are stored in the order i, f, g, o. The variants are those of `reference.recurrent`; with zoneout
the new h comes from the new c before zoneout, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import NORMAL, Noise, States, Weights, affine, keep, layer_of, normalised, sequence

__all__ = ["lstm", "lstm_cell"]


def lstm_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    ln_ih: Tensor | None = None,
    ln_hh: Tensor | None = None,
    ln_c: Tensor | None = None,
    ln_c_bias: Tensor | None = None,
    noise: Noise = NORMAL,
) -> tuple[Tensor, Tensor]:
    """One step: c' = f * c + i * g, h' = W_hr (o * tanh(c')); without w_hr there is no projection.

    With variants, N being layer normalisation, m the dropout mask, z the shares of zoneout:
    i, f, g, o from N(W_ih x) + b_ih + N(W_hh (m * h)) + b_hh; c~ = f * c + i * g; h~ = W_hr (o * tanh(N(c~)));
    c' = c~ + z_c * (c - c~), h' = h~ + z_h * (h - h~).
    """
    recurrent = h if noise.dropout is None else noise.dropout * h
    gates = affine(input, w_ih, b_ih, ln_ih) + affine(recurrent, w_hh, b_hh, ln_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * normalised(new_c, ln_c, ln_c_bias).tanh()
    new_h = new_h if w_hr is None else functional.linear(new_h, w_hr)
    return keep(new_h, h, noise.zoneout_h), keep(new_c, c, noise.zoneout_c)


def _step(input: Tensor, states: States, weights: Weights, noise: Noise) -> States:
    h, c = states
    return lstm_cell(input, h, c, *weights, noise=noise)


def lstm(
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
    zoneout_c: Tensor | None = None,
) -> tuple[Tensor, States]:
    """The LSTM over a sequence; arguments and results as in `reference.recurrent.sequence`.

    The last three are `Noise`, with layers and directions as the first dimension.
    """
    return sequence(
        layer_of(_step),
        input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
        layer_norm, Noise(dropout_mask, zoneout_h, zoneout_c),
    )  # fmt: skip
