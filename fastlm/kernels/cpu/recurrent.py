"""The native GRU and plain RNN: one direction of one layer over a packed sequence, without gradients.

Packed sequences are those of `fastlm.kernels.cpu.lstm`. A row's result never depends on the other rows, on the steps
taken in one call, or on the thread count. float32 on the CPU, but the weights may be bfloat16; tensors need not be
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.packing import cached, pack

__all__ = ["layer_forward"]


class _Packed(NamedTuple):
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor


def _pack(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> _Packed:
    rows, hidden = w_hh.shape
    of_x, of_h = (torch.zeros(rows) if bias is None else bias.detach().float() for bias in (b_ih, b_hh))
    gates = rows // hidden
    if gates == 1:
        return _Packed(pack(w_ih.t()), pack(w_hh.t()), pack((of_x + of_h)[None]))
    # A GRU's n keeps the two apart: r is multiplied by one of them alone.
    both = torch.cat([(of_x + of_h)[: 2 * hidden], of_x[2 * hidden :], of_h[2 * hidden :]])
    return _Packed(pack(w_ih.t(), gates=gates), pack(w_hh.t(), gates=gates), pack(both[None], gates=4))


def layer_forward(
    cell: str,
    input: Tensor,
    batch_sizes: Sequence[int],
    h0: Tensor,
    weights: Sequence[Tensor | None],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer over a packed sequence.

    Args:
        cell: "gru", "tanh" or "relu".
        input: [N, I].
        batch_sizes: at least one, each at least 1 and none greater than the one before; they sum to N.
        h0: [B, H], where B = batch_sizes[0].
        weights: w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G is 3 for a GRU, else 1.
        reverse: walk from the last step to the first.

    Returns:
        output [N, H], h_n [B, H].

    Raises:
        ValueError: `batch_sizes` is empty or not as above. Other shapes are the caller's to check.
    """
    module = native.CPU.require()
    packed = cached("recurrent", weights, _pack)
    input, h0 = input.contiguous(), h0.contiguous()
    rows, inputs = input.shape
    batch, hidden = h0.shape
    output, h_n = input.new_empty(rows, hidden), torch.empty_like(h0)
    module.recurrent_forward(
        getattr(module.RecurrentCell, cell),
        batch_sizes,
        rows,
        batch,
        inputs,
        hidden,
        reverse,
        packed.w_ih.dtype is torch.bfloat16,
        input.data_ptr(),
        packed.w_ih.data_ptr(),
        packed.w_hh.data_ptr(),
        packed.bias.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        native.num_threads(),
    )
    return output, h_n
