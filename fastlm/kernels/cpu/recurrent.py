"""The native GRU and plain RNN: one direction of one layer over a packed sequence, and its gradients.

Packed sequences are those of `fastlm.kernels.cpu.lstm`. A row's result never depends on the other rows, on the steps
taken in one call, or on the thread count. float32 on the CPU, but the weights may be bfloat16; tensors need not be
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.recurrent_digits import (
    bounded,
    columns_in_digits,
    gradients_in_digits,
    in_digits,
    pack_columns,
    parts_of_inputs,
    product,
)
from fastlm.kernels.packing import cached, pack, pack_digits

__all__ = ["Packed", "Saved", "layer_backward", "layer_forward", "pack_in_digits", "pack_layer"]


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """input, w_ih, w_hh, h0, output, gates [panels, N, 4, lanes] of a GRU."""
    cell: str
    batch_sizes: Sequence[int]
    reverse: bool


class Packed(NamedTuple):
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor


def pack_layer(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, in_digits: bool = False) -> Packed:
    """The weights of a layer in one direction as the kernels want them."""
    rows, hidden = w_hh.shape
    of_weight = pack_digits if in_digits else pack
    none = w_hh.new_zeros(rows, dtype=torch.float32)
    of_x, of_h = (none if bias is None else bias.detach().float() for bias in (b_ih, b_hh))
    gates = rows // hidden
    if gates == 1:
        return Packed(of_weight(w_ih.t()), of_weight(w_hh.t()), pack((of_x + of_h)[None]))
    # A GRU's n keeps the two apart: r is multiplied by one of them alone.
    both = torch.cat([(of_x + of_h)[: 2 * hidden], of_x[2 * hidden :], of_h[2 * hidden :]])
    return Packed(of_weight(w_ih.t(), gates=gates), of_weight(w_hh.t(), gates=gates), pack(both[None], gates=4))


pack_in_digits = partial(pack_layer, in_digits=True)


def layer_forward(
    cell: str,
    input: Tensor,
    batch_sizes: Sequence[int],
    h0: Tensor,
    weights: Sequence[Tensor | None],
    reverse: bool,
    save: bool = False,
) -> tuple[Tensor, Tensor, Saved | None]:
    """One direction of one layer over a packed sequence.

    Args:
        cell: "gru", "tanh" or "relu".
        input: [N, I].
        batch_sizes: at least one, each at least 1 and none greater than the one before; they sum to N.
        h0: [B, H], where B = batch_sizes[0].
        weights: w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G is 3 for a GRU, else 1.
        reverse: walk from the last step to the first.
        save: keep what `layer_backward` needs.

    Returns:
        output [N, H], h_n [B, H], and what to give to `layer_backward` (None without `save`).

    Raises:
        ValueError: `batch_sizes` is empty or not as above. Other shapes are the caller's to check.
    """
    module = native.CPU.require()
    w_ih, w_hh, *_ = weights
    assert w_ih is not None and w_hh is not None
    digits = cell != "relu" and in_digits(w_ih, w_hh)  # a relu's states have no bound
    packed = cached("recurrent digits", weights, pack_in_digits) if digits else cached("recurrent", weights, pack_layer)
    input, h0 = input.contiguous(), h0.contiguous()
    gated = {"gru": 3}.get(cell, 0)
    parts = parts_of_inputs(input, w_ih, packed.w_ih, gated, save=save) if digits else None
    rows, inputs = input.shape
    batch, hidden = h0.shape
    output, h_n = native.empty(rows, hidden), torch.empty_like(h0)
    gates = None
    if save and cell == "gru":
        lanes = module.simd_lanes()
        gates = native.empty(-(-hidden // lanes), rows, 4, lanes)
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
        native.address(gates),
        native.num_threads(),
        digits,
        native.address(parts),
    )
    saved = Saved((input, *weights[:2], h0, output, gates), cell, batch_sizes, reverse) if save else None
    return output, h_n, saved


def layer_backward(
    saved: Saved, grad_output: Tensor | None, grad_h_n: Tensor | None, needs: Sequence[bool] = (True,) * 6
) -> tuple[Tensor | None, ...]:
    """Gradients of `layer_forward`, given those of output and h_n (None: zero). Deterministic.

    Args:
        saved: from `layer_forward`.
        grad_output, grad_h_n: [N, H], [B, H].
        needs: which of the results to compute, in their order.

    Returns:
        Those of input, h0, w_ih, w_hh, b_ih, b_hh, None where not needed.
    """
    module = native.CPU.require()
    input, w_ih, w_hh, h0, output, gates = saved.tensors
    assert input is not None and w_ih is not None and w_hh is not None and h0 is not None and output is not None
    if gates is not None and gates.shape[-1] != module.simd_lanes():
        raise RuntimeError(f"{saved.cell}: the instruction-set level has changed since the forward pass")
    rows, (batch, hidden) = input.shape[0], h0.shape
    grads = [None if grad is None else grad.contiguous() for grad in (grad_output, grad_h_n)]
    of_h = native.empty(rows, w_hh.shape[0])
    of_x = of_h if gates is None else native.empty(rows, w_hh.shape[0])
    previous = native.empty(rows, hidden) if needs[3] else None
    grad_h0 = torch.empty_like(h0)
    digits = gradients_in_digits(w_ih, w_hh)
    in_which = columns_in_digits(w_hh.shape[0] // hidden) if digits else pack_columns
    columns = cached("columns of digits" if digits else "columns", (w_hh,), in_which)
    module.recurrent_backward(
        getattr(module.RecurrentCell, saved.cell),
        saved.batch_sizes,
        rows,
        batch,
        hidden,
        saved.reverse,
        columns.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        native.address(gates),
        native.address(grads[0]),
        native.address(grads[1]),
        of_x.data_ptr(),
        of_h.data_ptr(),
        native.address(previous),
        grad_h0.data_ptr(),
        native.num_threads(),
        digits,
    )
    return (
        product(of_x, w_ih.float()) if needs[0] else None,
        grad_h0 if needs[1] else None,
        product(of_x.t(), input) if needs[2] else None,
        None if previous is None else product(of_h.t(), previous, digits=saved.cell != "relu" and bounded(h0)),
        of_x.sum(0) if needs[4] else None,
        of_h.sum(0) if needs[5] else None,
    )
