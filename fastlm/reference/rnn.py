"""Simple recurrent network (Elman, 1990, https://doi.org/10.1207/s15516709cog1402_1) with tanh or ReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import Noise, States, Weights, layer_of, sequence

__all__ = ["rnn", "rnn_cell"]


def rnn_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or ReLU in place of tanh."""
    total = functional.linear(input, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
    return total.tanh() if nonlinearity == "tanh" else total.relu()


def rnn(
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    dropout: float,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, States]:
    """The RNN over a sequence; arguments and results as in `reference.recurrent.sequence`."""

    def step(input: Tensor, states: States, weights: Weights, _: Noise) -> States:
        return (rnn_cell(input, states[0], *weights[:4], nonlinearity=nonlinearity),)

    return sequence(
        layer_of(step),
        input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
    )  # fmt: skip
