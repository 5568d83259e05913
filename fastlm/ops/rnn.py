"""Simple recurrent networks: the sequence and the cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastlm.ops.library import autograd_by_reference, tracing
from fastlm.ops.recurrent import (
    SequenceOp,
    check_cell,
    native_cell,
    native_cell_why_not,
    native_sequence,
    native_sequence_why_not,
    torch_sequence,
)
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import rnn as reference
from fastlm.reference.recurrent import States

__all__ = ["rnn", "rnn_cell"]

_SEQUENCES = {"tanh": torch_sequence(_VF.rnn_tanh), "relu": torch_sequence(_VF.rnn_relu)}
_CELLS = {"tanh": _VF.rnn_tanh_cell, "relu": _VF.rnn_relu_cell}
_NATIVE_SEQUENCES = {name: native_sequence(name) for name in _CELLS}
_NATIVE_CELLS = {name: native_cell(name) for name in _CELLS}


def _torch_run(*args: Any) -> tuple[Tensor, States]:
    return _SEQUENCES[args[-1]](*args[:-1])


def _torch_cell(*args: Any) -> Tensor:
    return _CELLS[args[-1]](*args[:-1])


def _native_run(*args: Any) -> tuple[Tensor, States]:
    return _NATIVE_SEQUENCES[args[-1]](*args[:-1])


def _native_cell(*args: Any) -> Tensor:
    return _NATIVE_CELLS[args[-1]](*args[:-1])


def _native_cell_why_not(*args: Any) -> str | None:
    return native_cell_why_not(*args[:-1])


RNN = SequenceOp(
    "rnn",
    1,
    [
        Implementation("cpu", _native_run, native_sequence_why_not),
        Implementation("torch", _torch_run, always),
        Implementation("reference", reference.rnn, always),
    ],
    extra=", str nonlinearity",
)

RNN_CELL = Op(
    "rnn_cell",
    [
        Implementation("cpu", _native_cell, _native_cell_why_not),
        Implementation("torch", _torch_cell, always),
        Implementation("reference", reference.rnn_cell, always),
    ],
)


def _check_nonlinearity(op: str, nonlinearity: str) -> None:
    if nonlinearity not in _CELLS:
        raise ValueError(f"{op}: nonlinearity is {nonlinearity!r}, expected 'tanh' or 'relu'")


def rnn(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or ReLU in place of tanh.

    Elman, 1990, https://doi.org/10.1207/s15516709cog1402_1.

    Args:
        input: [T, B, I]; [B, T, I] where `batch_first`; [N, I] with `batch_sizes`. Any floating dtype.
        h0: [num_layers * D, B, H], where D is 2 if `bidirectional`, else 1.
        weights: in the order of `torch.nn.RNN`: for each layer and direction w_ih [H, I], w_hh [H, H] and, with
            `bias`, b_ih [H], b_hh [H].
        nonlinearity: "tanh" or "relu".
        dropout: probability of zeroing an element of each layer's output but the last's, where `training`.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU: rows still running at each time, longest first.

    Returns:
        output, like `input` with D * H in the last dimension, and h_n, like `h0`.

    Raises:
        ValueError: a shape, dtype or `nonlinearity` does not fit, the sequence is empty, or `batch_sizes` are
            inconsistent.
    """
    _check_nonlinearity("rnn", nonlinearity)
    dropout = dropout if training else 0.0
    output, (h_n,) = RNN(
        input, (h0,), weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout, 0, nonlinearity
    )
    return output, h_n


@torch.library.custom_op("fastlm::rnn_cell", mutates_args=())
def _rnn_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    return RNN_CELL(input, h, w_ih, w_hh, b_ih, b_hh, nonlinearity).contiguous()


@_rnn_cell.register_fake
def _(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    return h.new_empty(h.shape)


autograd_by_reference(_rnn_cell, reference.rnn_cell, differentiable=range(6))


def rnn_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of `rnn`.

    Args:
        input: [B, I], any floating dtype.
        h: [B, H].
        w_ih, w_hh: [H, I], [H, H].
        b_ih, b_hh: [H] or None.
        nonlinearity: "tanh" or "relu".

    Returns:
        The next h, [B, H].

    Raises:
        ValueError: a shape, dtype or `nonlinearity` does not fit.
    """
    _check_nonlinearity("rnn_cell", nonlinearity)
    check_cell("rnn_cell", 1, input, (h,), w_ih, w_hh, b_ih, b_hh)
    if tracing():
        return _rnn_cell(input, h, w_ih, w_hh, b_ih, b_hh, nonlinearity)
    return RNN_CELL(input, h, w_ih, w_hh, b_ih, b_hh, nonlinearity)
