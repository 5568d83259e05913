"""Long short-term memory (Hochreiter & Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735).

With the forget gate of Gers et al., 2000, and the projection of Sak et al., 2014, https://arxiv.org/abs/1402.1128;
no peepholes. Gates are stored in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import States, Weights, layer_of, sequence

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
) -> tuple[Tensor, Tensor]:
    """One step: c' = f * c + i * g, h' = W_hr (o * tanh(c')); without w_hr there is no projection."""
    gates = functional.linear(input, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else functional.linear(h, w_hr)), c


def _step(input: Tensor, states: States, weights: Weights) -> States:
    h, c = states
    return lstm_cell(input, h, c, *weights)


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
) -> tuple[Tensor, States]:
    """The LSTM over a sequence; arguments and results as in `reference.recurrent.sequence`."""
    return sequence(
        layer_of(_step),
        input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
    )  # fmt: skip
