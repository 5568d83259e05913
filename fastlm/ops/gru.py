"""Gated recurrent units: the sequence and the cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _VF, Tensor

from fastlm.kernels.cuda import gru as cuda_kernel
from fastlm.ops.library import autograd_by_reference, cuda_why_not, tracing
from fastlm.ops.recurrent import (
    SequenceOp,
    check_cell,
    native_cell,
    native_cell_why_not,
    native_sequence,
    native_sequence_why_not,
    torch_sequence,
)
from fastlm.ops.recurrent_variants import GRU_VARIANT, drawn, layer_by
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import gru as reference
from fastlm.reference.recurrent import NORMAL, Weights

__all__ = ["gru", "gru_cell"]


_cuda_layer = layer_by(cuda_kernel)


def _cuda_cell(input: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
    """A layer of one step."""
    return _cuda_layer(input, [len(input)], (h,), Weights(*weights), False, NORMAL)[0]  # type: ignore[arg-type]


def _cuda_cell_why_not(input: Tensor, *tensors: Tensor | None) -> str | None:
    return "the batch is empty" if input.numel() == 0 else cuda_why_not(input, *tensors)


GRU = SequenceOp(
    "gru",
    3,
    [
        Implementation("cpu", native_sequence("gru"), native_sequence_why_not),
        Implementation("torch", torch_sequence(_VF.gru), always),
        Implementation("reference", reference.gru, always),
    ],
)

GRU_CELL = Op(
    "gru_cell",
    [
        Implementation("cpu", native_cell("gru"), native_cell_why_not),
        Implementation("torch", _VF.gru_cell, always),
        # After torch's, which is fused as well, until there are measurements on a GPU that put it first.
        Implementation("cuda", _cuda_cell, _cuda_cell_why_not),
        Implementation("reference", reference.gru_cell, always),
    ],
)


def gru(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
    layer_norm: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """r, z = sigmoid(...), n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), h' = (1 - z) * n + z * h.

    Cho et al., 2014, https://arxiv.org/abs/1406.1078, in the variant of cuDNN and `torch.nn.GRU`. The backward can be
    differentiated only where the chosen implementation is "reference". The formulas of the last three arguments, which
    combine freely, are those of `reference.gru.gru_cell`.

    Args:
        input: [T, B, I]; [B, T, I] where `batch_first`; [N, I] with `batch_sizes`. Any floating dtype.
        h0: [num_layers * D, B, H], where D is 2 if `bidirectional`, else 1.
        weights: in the order of `torch.nn.GRU`: for each layer and direction w_ih [3H, I], w_hh [3H, H] and, with
            `bias`, b_ih [3H], b_hh [3H]; the gates in the order r, z, n. With `layer_norm` then the gains ln_ih [3H],
            ln_hh [3H].
        dropout: probability of zeroing an element of each layer's output but the last's, where `training`.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU: rows still running at each time, longest first.
        layer_norm: normalises W_ih x and W_hh h, all gates together (Ba et al., 2016,
            https://arxiv.org/abs/1607.06450); the shifts are the biases.
        recurrent_dropout: where `training`, probability of zeroing an element of h before W_hh, the same ones at every
            step (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287).
        zoneout: probability with which an element of h stays as it was; outside of `training` its expectation (Krueger
            et al., 2017, https://arxiv.org/abs/1606.01305).

    Returns:
        output, like `input` with D * H in the last dimension, and h_n, like `h0`.

    Raises:
        ValueError: a shape or dtype does not fit, the sequence is empty, `batch_sizes` are inconsistent, or a
            probability is none.
    """
    dropout = dropout if training else 0.0
    recurrent_dropout = recurrent_dropout if training else 0.0
    layout = (weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout, 0)
    if layer_norm or recurrent_dropout or zoneout:
        draw = drawn("gru", recurrent_dropout, (zoneout,), training)
        output, (h_n,) = GRU_VARIANT(input, (h0,), *layout, layer_norm, layer_norm=layer_norm, draw=draw)
    else:
        output, (h_n,) = GRU(input, (h0,), *layout)
    return output, h_n


@torch.library.custom_op("fastlm::gru_cell", mutates_args=())
def _gru_cell(input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    return GRU_CELL(input, h, w_ih, w_hh, b_ih, b_hh).contiguous()


@_gru_cell.register_fake
def _(input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    return h.new_empty(h.shape)


autograd_by_reference(_gru_cell, reference.gru_cell, differentiable=range(6))


def gru_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of `gru`.

    Args:
        input: [B, I], any floating dtype.
        h: [B, H].
        w_ih, w_hh: [3H, I], [3H, H]; the gates in the order r, z, n.
        b_ih, b_hh: [3H] or None.

    Returns:
        The next h, [B, H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_cell("gru_cell", 3, input, (h,), w_ih, w_hh, b_ih, b_hh)
    if tracing():
        return _gru_cell(input, h, w_ih, w_hh, b_ih, b_hh)
    return GRU_CELL(input, h, w_ih, w_hh, b_ih, b_hh)
