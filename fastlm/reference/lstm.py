"""Long short-term memory (Hochreiter & Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735).

With the forget gate of Gers et al., 2000, and the projection of Sak et al., 2014, https://arxiv.org/abs/1402.1128;
no peepholes. Gates are stored in the order i, f, g, o. Three variants, which combine freely:

- layer normalisation (Ba et al., 2016, https://arxiv.org/abs/1607.06450): of W_ih x, of W_hh h, and of c' on its way to
  h'. The shifts of the first two are the biases b_ih and b_hh.
- variational recurrent dropout (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287): h is multiplied by one mask
  for the whole sequence before W_hh.
- zoneout (Krueger et al., 2017, https://arxiv.org/abs/1606.01305): elements of h and c stay as they were, at random in
  training, by expectation elsewhere. The new h comes from the new c before zoneout, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import NORMAL, Noise, States, Weights, layer_of, sequence

__all__ = ["NORM_EPS", "draw_noise", "lstm", "lstm_cell"]

NORM_EPS = 1e-5
"""Added to the variance in layer normalisation, as torch's default."""


def _norm(x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Layer normalisation over the last dimension, all gates together; without a gain, nothing."""
    return x if gain is None else functional.layer_norm(x, gain.shape, gain, bias, NORM_EPS)


def _keep(new: Tensor, old: Tensor, share: Tensor | None) -> Tensor:
    """Zoneout: `share` of the old."""
    return new if share is None else new + share * (old - new)


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
    gates = _norm(functional.linear(input, w_ih), ln_ih) + _norm(functional.linear(recurrent, w_hh), ln_hh)
    for bias in (b_ih, b_hh):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, dim=-1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * _norm(new_c, ln_c, ln_c_bias).tanh()
    new_h = new_h if w_hr is None else functional.linear(new_h, w_hr)
    return _keep(new_h, h, noise.zoneout_h), _keep(new_c, c, noise.zoneout_c)


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


def draw_noise(
    rows: int,
    states: States,
    recurrent_dropout: float,
    zoneout: tuple[float, float],
    training: bool,
) -> Noise:
    """Draws from torch's generator what `lstm` takes; nothing is drawn outside of training.

    Args:
        rows: N, of the input over all steps.
        states: h0 [layers * directions, B, P] and c0 [layers * directions, B, H].
        recurrent_dropout: probability of zeroing an element of h; what is left is scaled by 1 / (1 - p).
        zoneout: probabilities of keeping an element of h, and of c.
    """
    h, c = states

    def shares(state: Tensor, p: float) -> Tensor | None:
        if not p:
            return None
        size = (state.shape[0], rows, state.shape[2])
        return h.new_empty(size).bernoulli_(p) if training else h.new_full((), p).expand(size)

    mask = functional.dropout(torch.ones_like(h), recurrent_dropout) if recurrent_dropout and training else None
    return Noise(mask, shares(h, zoneout[0]), shares(c, zoneout[1]))
