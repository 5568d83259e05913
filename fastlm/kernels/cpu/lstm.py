"""The native LSTM: one direction of one layer over a packed sequence, its gradients, and a single step.

A packed sequence is torch's: rows [N, ...] in time order, `batch_sizes[t]` of them for step t, none greater than the
one before; row b of every step belongs to sequence b. A padded batch [T, B, ...] is `batch_sizes = [B] * T`.
Everything is float32 on the CPU, but the weights may be bfloat16; tensors need not be contiguous. The gates are i, f,
g, o, as in torch.

The forward pass is ours throughout, input projection included, so that a row's result never depends on the other
rows, the length of the sequence or the thread count. Of the gradients the recurrence is ours; those of the weights and
of the input are one matrix product each over all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.recurrent_digits import (
    bounded,
    columns_in_digits,
    gradients_in_digits,
    in_digits,
    in_parts,
    pack_columns,
    parts_of_inputs,
    product,
)
from fastlm.kernels.packing import cached, find, pack, pack_digits, remembered

__all__ = [
    "Gradients",
    "Saved",
    "cell",
    "layer_backward",
    "layer_forward",
    "pack_in_digits",
    "pack_layer",
    "prepared_cell",
]


class _Packed(NamedTuple):
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor
    w_hr: Tensor | None
    inputs: int
    hidden: int
    addresses: tuple[int, int, int]
    """Of w_ih, w_hh and bias."""
    bfloat: bool
    digits: bool


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """input, w_ih, w_hh, w_hr, h0, c0, output, gates [panels, N, 4, lanes], cells [N, H], unprojected [N, H]."""
    batch_sizes: Sequence[int]
    reverse: bool


class Gradients(NamedTuple):
    """Gradients of `layer_forward`'s arguments, None where not needed."""

    input: Tensor | None
    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    h0: Tensor | None
    c0: Tensor | None


def _pack_biases(w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    biases = [bias.detach().float() for bias in (b_ih, b_hh) if bias is not None]
    total = sum(biases[1:], biases[0]) if biases else w_ih.new_zeros(w_ih.shape[0], dtype=torch.float32)
    return pack(total[None], gates=4)


def _pack(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None = None) -> _Packed:
    shared = pack(w_ih.t(), gates=4), pack(w_hh.t(), gates=4), _pack_biases(w_ih, b_ih, b_hh)
    projection = None if w_hr is None else pack(w_hr.t())
    rows, inputs = w_ih.shape
    ih, hh, bias = (tensor.data_ptr() for tensor in shared)
    return _Packed(*shared, projection, inputs, rows // 4, (ih, hh, bias), w_ih.dtype is torch.bfloat16, False)


def pack_in_digits(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> _Packed:
    """The same where `in_digits`; not remembered."""
    floats = _pack_biases(w_ih, b_ih, b_hh)
    shared = pack_digits(w_ih.t(), gates=4), pack_digits(w_hh.t(), gates=4), floats
    ih, hh, bias = (tensor.data_ptr() for tensor in shared)
    return _Packed(*shared, None, w_ih.shape[1], w_ih.shape[0] // 4, (ih, hh, bias), False, True)


def pack_layer(
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None = None
) -> _Packed:
    """The weights of a layer in one direction as the kernels want them, packed once."""
    biased = (w_ih, w_hh, b_ih, b_hh)
    return cached("lstm", biased if w_hr is None else (*biased, w_hr), _pack)


class _Prepared:
    """The weights of a layer without projection, as digits where `in_digits`."""

    __slots__ = ("_begun", "_parts", "packed", "step")
    step: Callable[..., tuple[Tensor, Tensor, Tensor | None] | None] | None
    """csrc/python/lstm_step.h; None where native code cannot read these weights."""

    def __init__(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> None:
        biased = (w_ih, w_hh, b_ih, b_hh)
        self._begun, self.step = _begin(biased), None
        self._parts: Tensor | None = None
        digits = in_digits(w_ih, w_hh)
        self.packed = cached("lstm digits", biased, pack_in_digits) if digits else pack_layer(*biased)
        self._make_step()

    def parts(self, w_ih: Tensor) -> Tensor:
        """W_ih as parts: some rows of inputs are not in digits."""
        parts = in_parts(w_ih, 4)
        if self._parts is None:  # those given once are kept: another thread's step may be reading them
            self._parts = parts
            self._make_step()
        return parts

    def _make_step(self) -> None:
        if self._begun is not None:
            packed = self.packed
            sizes = packed.inputs, packed.hidden
            places = *packed.addresses, packed.digits, native.address(self._parts)
            self.step = native.CPU.require().lstm_step(self._begun, *sizes, *places)


def _begin(weights: Sequence[Tensor | None]) -> object | None:
    """What native steps hold against the weights later; before these are packed."""
    if not native.shows_tensors():
        return None
    try:
        begun: object = native.CPU.require().lstm_step_begin(weights, torch.empty_like)
    except ValueError:  # not float32, or not contiguous, or of a class of its own
        return None
    return begun


def _prepare(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> _Prepared:
    return cached("lstm prepared", (w_ih, w_hh, b_ih, b_hh), _Prepared)


def layer_forward(
    input: Tensor,
    batch_sizes: Sequence[int],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """One direction of one layer over a packed sequence.

    Args:
        input: [N, I].
        batch_sizes: at least one, each at least 1 and none greater than the one before; they sum to N.
        w_ih, w_hh: [4H, I], [4H, P].
        b_ih, b_hh: [4H] or None.
        w_hr: [P, H], the projection, or None: P = H.
        h0, c0: [B, P], [B, H], where B = batch_sizes[0].
        reverse: walk from the last step to the first; a sequence begins at its own last step.
        save: keep what `layer_backward` needs.

    Returns:
        output [N, P], h_n [B, P], c_n [B, H], and what to give to `layer_backward` (None without `save`).

    Raises:
        ValueError: `batch_sizes` is empty or not as above. Other shapes are the caller's to check.
    """
    module = native.CPU.require()
    rows, inputs = input.shape
    batch, outputs = h0.shape
    hidden = c0.shape[1]
    biased = (w_ih, w_hh, b_ih, b_hh)
    packed = _prepare(*biased).packed if w_hr is None else pack_layer(*biased, w_hr)
    digits = packed.digits
    input, h0, c0 = input.contiguous(), h0.contiguous(), c0.contiguous()
    parts = parts_of_inputs(input, w_ih, packed.w_ih, 4, save=save) if digits else None
    output, h_n, c_n = native.empty(rows, outputs), torch.empty_like(h0), torch.empty_like(c0)
    gates = cells = unprojected = None
    if save:
        lanes = module.simd_lanes()
        gates = native.empty(-(-hidden // lanes), rows, 4, lanes)
        cells = native.empty(rows, hidden)
        unprojected = None if w_hr is None else native.empty(rows, hidden)
    module.lstm_forward(
        batch_sizes,
        rows,
        batch,
        inputs,
        hidden,
        outputs,
        reverse,
        packed.bfloat,
        input.data_ptr(),
        packed.w_ih.data_ptr(),
        packed.w_hh.data_ptr(),
        packed.bias.data_ptr(),
        native.address(packed.w_hr),
        h0.data_ptr(),
        c0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr(),
        native.address(gates),
        native.address(cells),
        native.address(unprojected),
        native.num_threads(),
        digits,
        native.address(parts),
    )
    if not save:
        return output, h_n, c_n, None
    tensors = (input, w_ih, w_hh, w_hr, h0, c0, output, gates, cells, unprojected)
    return output, h_n, c_n, Saved(tensors, batch_sizes, reverse)


def layer_backward(
    saved: Saved,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    needs: Sequence[bool] = (True,) * 8,
) -> Gradients:
    """Gradients of `layer_forward`, given those of its results (None: zero). Deterministic.

    Args:
        saved: from `layer_forward`.
        grad_output, grad_h_n, grad_c_n: [N, P], [B, P], [B, H].
        needs: which of `Gradients` to compute, in its order.
    """
    module = native.CPU.require()
    input, w_ih, w_hh, w_hr, h0, c0, output, gates, cells, unprojected = saved.tensors
    assert input is not None and w_ih is not None and w_hh is not None and h0 is not None and c0 is not None
    assert gates is not None and cells is not None and output is not None
    if gates.shape[-1] != module.simd_lanes():
        raise RuntimeError("lstm: the instruction-set level has changed since the forward pass")
    rows = input.shape[0]
    batch, outputs = h0.shape
    hidden = c0.shape[1]
    digits = w_hr is None and gradients_in_digits(w_ih, w_hh)
    columns = (
        cached("columns of digits", (w_hh,), columns_in_digits(4))
        if digits
        else cached("columns", (w_hh,), pack_columns)
    )
    projection = None if w_hr is None else cached("columns", (w_hr,), pack_columns)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_output, grad_h_n, grad_c_n)]
    grad_gates = native.empty(rows, 4 * hidden)
    grad_projected = None if w_hr is None else native.empty(rows, outputs)
    previous = native.empty(rows, outputs) if needs[2] else None
    grad_h0, grad_c0 = torch.empty_like(h0), torch.empty_like(c0)
    module.lstm_backward(
        saved.batch_sizes,
        rows,
        batch,
        hidden,
        outputs,
        saved.reverse,
        columns.data_ptr(),
        native.address(projection),
        h0.data_ptr(),
        c0.data_ptr(),
        output.data_ptr(),
        gates.data_ptr(),
        cells.data_ptr(),
        native.address(grads[0]),
        native.address(grads[1]),
        native.address(grads[2]),
        grad_gates.data_ptr(),
        native.address(grad_projected),
        native.address(previous),
        grad_h0.data_ptr(),
        grad_c0.data_ptr(),
        native.num_threads(),
        digits,
    )
    grad_bias = grad_gates.sum(0) if needs[3] or needs[4] else None
    return Gradients(
        product(grad_gates, w_ih.float()) if needs[0] else None,
        product(grad_gates.t(), input) if needs[1] else None,
        None if previous is None else product(grad_gates.t(), previous, digits=bounded(h0)),
        grad_bias if needs[3] else None,
        grad_bias.clone() if needs[4] and grad_bias is not None else None,
        product(grad_projected.t(), unprojected, digits=True)
        if needs[5] and grad_projected is not None and unprojected is not None
        else None,
        grad_h0 if needs[6] else None,
        grad_c0 if needs[7] else None,
    )


def cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step for a batch: input [B, I], h and c [B, H] -> the next h and c. The same bits as `layer_forward`."""
    return _cell(_prepare(w_ih, w_hh, b_ih, b_hh), w_ih, input.contiguous(), h.contiguous(), c.contiguous(), None)


def prepared_cell(
    input: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None], copy: bool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`cell` for weights that it has packed before, as (h, c, a copy of h or None), or None where it has not.

    Also None unless input is [..., I], h and c [..., H], all plain, contiguous, of the weights' dtype and on the CPU.
    Of the weights (w_ih, w_hh, b_ih, b_hh) the packed ones prove as much.
    """
    prepared = remembered("lstm prepared", weights)
    if not isinstance(prepared, _Prepared):
        return None
    if prepared.step is not None:
        found = prepared.step(*weights, input, h, c, copy, native.num_threads())
        if found is not None:
            return found
    if find("lstm prepared", weights) is None:
        return None
    packed, w_ih = prepared.packed, weights[0]
    assert w_ih is not None
    dtype = torch.bfloat16 if packed.bfloat else torch.float32
    for tensor in (input, h, c):
        if not (type(tensor) is Tensor and tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()):
            return None
    *batch, inputs = input.shape
    shape = h.shape
    if shape != c.shape or shape != (*batch, packed.hidden) or inputs != packed.inputs or input.numel() == 0:
        return None
    if packed.bfloat:
        h, c = _cell(prepared, w_ih, input.float(), h.float(), c.float(), None)
        h, c = h.to(dtype), c.to(dtype)
        return h, c, h.clone() if copy else None
    output = torch.empty_like(h) if copy else None
    return *_cell(prepared, w_ih, input, h, c, output), output


def _cell(
    prepared: _Prepared,
    w_ih: Tensor,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    output: Tensor | None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    packed = prepared.packed
    h_out, c_out = torch.empty_like(h), torch.empty_like(c)
    done = native.CPU.require().lstm_cell(
        h.numel() // packed.hidden,
        packed.inputs,
        packed.hidden,
        packed.bfloat,
        input.data_ptr(),
        h.data_ptr(),
        c.data_ptr(),
        *packed.addresses,
        h_out.data_ptr(),
        c_out.data_ptr(),
        native.address(output),
        native.num_threads(),
        packed.digits,
        native.address(parts),
    )
    if done:
        return h_out, c_out
    return _cell(prepared, w_ih, input, h, c, output, prepared.parts(w_ih))
