"""Long short-term memory: the sequence and the cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _VF, Tensor

from fastlm.ops.library import autograd_by_reference, tracing
from fastlm.ops.recurrent import SequenceOp, check_cell, torch_sequence
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import lstm as reference

__all__ = ["lstm", "lstm_cell"]


def _torch_cell(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _VF.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)


LSTM = SequenceOp(
    "lstm",
    4,
    [
        Implementation("torch", torch_sequence(_VF.lstm), always),
        Implementation("reference", reference.lstm, always),
    ],
)

LSTM_CELL = Op(
    "lstm_cell",
    [
        Implementation("torch", _torch_cell, always),
        Implementation("reference", reference.lstm_cell, always),
    ],
)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """i, f, o = sigmoid(...), g = tanh(W_ig x + b_ig + W_hg h + b_hg), c' = f * c + i * g, h' = o * tanh(c').

    Hochreiter & Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735, as `torch.nn.LSTM`; with `proj_size`
    h' is multiplied by W_hr (Sak et al., 2014, https://arxiv.org/abs/1402.1128).

    Args:
        input: [T, B, I]; [B, T, I] where `batch_first`; [N, I] with `batch_sizes`. Any floating dtype.
        hx: h0 [num_layers * D, B, P] and c0 [num_layers * D, B, H], where D is 2 if `bidirectional`, else 1, and P is
            `proj_size`, or H where that is 0.
        weights: in the order of `torch.nn.LSTM`: for each layer and direction w_ih [4H, I], w_hh [4H, P], with `bias`
            b_ih [4H], b_hh [4H], and with `proj_size` w_hr [P, H]; the gates in the order i, f, g, o.
        dropout: probability of zeroing an element of each layer's output but the last's, where `training`.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU: rows still running at each time, longest first.

    Returns:
        output, like `input` with D * P in the last dimension, and (h_n, c_n), like `hx`.

    Raises:
        ValueError: a shape or dtype does not fit, the sequence is empty, or `batch_sizes` are inconsistent.
    """
    dropout = dropout if training else 0.0
    output, (h_n, c_n) = LSTM(
        input, tuple(hx), weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout, proj_size
    )
    return output, (h_n, c_n)


@torch.library.custom_op("fastlm::lstm_cell", mutates_args=())
def _lstm_cell(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    h_next, c_next = LSTM_CELL(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return h_next.contiguous(), c_next.contiguous()


@_lstm_cell.register_fake
def _(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), c.new_empty(c.shape)


autograd_by_reference(_lstm_cell, reference.lstm_cell, differentiable=range(7))


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`, without projection.

    Args:
        input: [B, I], any floating dtype.
        hx: h and c, each [B, H].
        w_ih, w_hh: [4H, I], [4H, H]; the gates in the order i, f, g, o.
        b_ih, b_hh: [4H] or None.

    Returns:
        The next h and c, each [B, H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    h, c = hx
    check_cell("lstm_cell", 4, input, (h, c), w_ih, w_hh, b_ih, b_hh)
    if tracing():
        return _lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return LSTM_CELL(input, h, c, w_ih, w_hh, b_ih, b_hh)
