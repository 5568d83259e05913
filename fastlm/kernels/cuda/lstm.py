"""The LSTM on a GPU, for what cuDNN can't do: layer normalisation, recurrent dropout, zoneout; and single steps.

Packed sequences are those of `fastlm.kernels.cpu.lstm`. Tensors are on one device, of one of `cuda.STORAGES`; they need
not be contiguous. The products that take all steps at once are cuBLAS's. Without layer normalisation the recurrence is
one launch for the whole sequence, forward and backward; with it, a product and a kernel for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import cuda, native
from fastlm.kernels.cuda.steps import (
    final,
    gradient_of_gain,
    initial_gradient,
    previous,
    product_backward,
    steps,
    times,
)

__all__ = ["MOST_ROWS", "Saved", "layer_backward", "layer_forward", "step"]

MOST_ROWS = 8
"""Of a batch for which `step`, which goes through the weights once for 4 rows, is ahead of two products."""


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, ln_c, ln_c_bias, dropout, zoneout_h, zoneout_c, h0, c0, output,
    cells [N, H], gates_x and gates_h [N, 4H], the two products."""
    batch_sizes: Sequence[int]
    reverse: bool


@functools.lru_cache(maxsize=64)
def _layout(batch_sizes: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Rows at each step, and where they start: int64 [T] each. By stream, in the order of which torch frees memory: a
    kernel may still read what falls out of the cache."""
    starts = list(accumulate(batch_sizes, initial=0))[:-1]
    running, first = torch.tensor([batch_sizes, starts]).to(device)
    return running, first


def _sequence(
    kernel: str,
    gates_x: Tensor,
    h0: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
    tensors: dict[str, Tensor | None],
) -> None:
    """All steps in one launch."""
    module = native.CUDA.require()
    stream = cuda.stream(gates_x.device)
    layout: dict[str, Tensor | None] = {}
    if batch_sizes[-1] != batch_sizes[0]:  # else nothing to copy to the device, as where a CUDA graph is recorded
        if native.values_unknown():
            raise RuntimeError(f"{kernel}: sequences of different lengths cannot be recorded in a CUDA graph")
        layout["running"], layout["starts"] = _layout(tuple(batch_sizes), gates_x.device, stream)
    scratch = torch.empty(module.lstm_sequence_scratch(*h0.shape), dtype=torch.uint8, device=gates_x.device)
    scratch[:64] = 0
    layout |= {"scratch": scratch, "gates_x": gates_x}
    with torch.cuda.device_of(gates_x):
        getattr(module, kernel)(
            cuda.STORAGES[gates_x.dtype],
            *h0.shape,
            len(batch_sizes),
            reverse,
            cuda.addresses(tensors | layout),
            stream,
        )


@cuda.without_autocast
def layer_forward(
    input: Tensor,
    batch_sizes: Sequence[int],
    weights: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """One direction of one layer over a packed sequence; arguments as `fastlm.ops.recurrent_variants.layer_by` says."""
    tensors = [None if t is None else t.detach().contiguous() for t in (input, *weights, *norms, *noise, h0, c0)]
    input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, ln_c, ln_c_bias, dropout, zoneout_h, zoneout_c, h0, c0 = tensors  # type: ignore[assignment]
    assert w_ih is not None and w_hh is not None
    rows, hidden = input.shape[0], h0.shape[1]
    gates_x = input @ w_ih.t()
    output = input.new_empty(rows, hidden)
    gates_h = torch.empty_like(gates_x) if save else None
    parameters = {"b_ih": b_ih, "b_hh": b_hh}
    if ln_ih is None:
        cells = torch.empty_like(output) if save else None
        h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
        given = {"w_hh": w_hh, "h0": h0, "c0": c0, "dropout": dropout, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
        results = {"output": output, "cells": cells, "gates_h": gates_h, "h_n": h_n, "c_n": c_n}
        _sequence("lstm_sequence", gates_x, h0, batch_sizes, reverse, given | parameters | results)
    else:
        cells = torch.empty_like(output)
        parameters |= {"ln_ih": ln_ih, "ln_hh": ln_hh, "ln_c": ln_c, "ln_c_bias": ln_c_bias}
        by_rows = {"gates_x": gates_x, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "h": output, "c": cells}
        layout = batch_sizes, reverse
        for (at, h), (_, c) in zip(steps(h0, output, *layout), steps(c0, cells, *layout), strict=True):
            masked = h if dropout is None else h * dropout[: len(h)]
            product = torch.mm(masked, w_hh.t(), out=None if gates_h is None else gates_h[at])
            of_step = {name: None if t is None else t[at] for name, t in by_rows.items()}
            states = {"gates_h": product, "h_prev": h, "c_prev": c}
            cuda.launch_cell("lstm_cell", h, of_step | states | parameters)
        h_n, c_n = final(output, *layout), final(cells, *layout)
    if not save:
        return output, h_n, c_n, None
    return output, h_n, c_n, Saved((*tensors, output, cells, gates_x, gates_h), batch_sizes, reverse)


class _Recurrence(NamedTuple):
    """Gradients that go back through the steps."""

    sum: Tensor
    """[N, 4H], of what the gates' nonlinearities take; gates_x and gates_h: of the two products."""
    gates_x: Tensor
    gates_h: Tensor
    ln_c: Tensor | None
    ln_c_bias: Tensor | None
    h0: Tensor
    c0: Tensor


def _recurrence(saved: Saved, grads: Sequence[Tensor | None]) -> _Recurrence:
    """Without layer normalisation: all steps in one launch."""
    _, _, w_hh, b_ih, b_hh, *_, dropout, zoneout_h, zoneout_c, h0, c0, _, cells, gates_x, gates_h = saved.tensors
    assert w_hh is not None and h0 is not None and c0 is not None and gates_x is not None
    grad_output, grad_h_n, grad_c_n = (None if grad is None else grad.contiguous() for grad in grads)
    grad_sum, grad_h0, grad_c0 = (torch.empty_like(t) for t in (gates_x, h0, c0))
    columns = w_hh.t().clone(memory_format=torch.contiguous_format)  # new memory, hence aligned
    given = {"w_hh_t": columns, "b_ih": b_ih, "b_hh": b_hh, "gates_h": gates_h, "cells": cells, "c0": c0}
    noise = {"dropout": dropout, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
    incoming = {"grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
    results = {"grad_sum": grad_sum, "grad_h0": grad_h0, "grad_c0": grad_c0}
    tensors = given | noise | incoming | results
    _sequence("lstm_sequence_backward", gates_x, h0, saved.batch_sizes, saved.reverse, tensors)
    return _Recurrence(grad_sum, grad_sum, grad_sum, None, None, grad_h0, grad_c0)


def _normed_recurrence(saved: Saved, grads: Sequence[Tensor | None]) -> _Recurrence:
    """With layer normalisation: a kernel and a product for each step."""
    _, _, w_hh, b_ih, b_hh, ln_ih, ln_hh, ln_c, ln_c_bias, dropout, zoneout_h, zoneout_c = saved.tensors[:12]
    h0, c0, _, cells, gates_x, gates_h = saved.tensors[12:]
    assert w_hh is not None and h0 is not None and c0 is not None and cells is not None and gates_x is not None
    layout = saved.batch_sizes, saved.reverse
    grad_output, grad_h_n, grad_c_n = grads
    grad_h, grad_c = initial_gradient(h0, grad_h_n), initial_gradient(c0, grad_c_n)
    grad_sum, grad_gates_x, grad_gates_h = (torch.empty_like(gates_x) for _ in range(3))
    grad_ln_c, grad_ln_c_bias = torch.empty_like(cells), torch.empty_like(cells)
    results = {"grad_sum": grad_sum, "grad_gates_x": grad_gates_x, "grad_gates_h": grad_gates_h}
    results |= {"grad_ln_c": grad_ln_c, "grad_ln_c_bias": grad_ln_c_bias}
    given = {"gates_x": gates_x, "gates_h": gates_h, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
    everywhere: dict[str, Tensor | None] = given | results | {"c_prev": previous(c0, cells, *layout)}
    parameters = {"b_ih": b_ih, "b_hh": b_hh, "ln_ih": ln_ih, "ln_hh": ln_hh, "ln_c": ln_c, "ln_c_bias": ln_c_bias}
    for at in reversed(times(*layout)):
        h, c = (grad[: at.stop - at.start] for grad in (grad_h, grad_c))
        if grad_output is not None:
            h += grad_output[at]
        of_step = {name: None if t is None else t[at] for name, t in everywhere.items()} | parameters
        in_place = {"grad_h": h, "grad_c": c, "grad_h_prev": h, "grad_c_prev": c}
        cuda.launch_cell("lstm_cell_backward", h, of_step | in_place)
        product_backward(h, grad_gates_h[at], w_hh, dropout)
    return _Recurrence(grad_sum, grad_gates_x, grad_gates_h, grad_ln_c, grad_ln_c_bias, grad_h, grad_c)


@cuda.without_autocast
def layer_backward(saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of `layer_forward`; arguments and results as those of the CPU. Deterministic."""
    input, w_ih, *_, h0, _, output, _, gates_x, gates_h = saved.tensors
    ln_ih, dropout = saved.tensors[5], saved.tensors[9]
    assert input is not None and w_ih is not None and h0 is not None and output is not None
    assert gates_x is not None and gates_h is not None
    found = (_recurrence if ln_ih is None else _normed_recurrence)(saved, grads)
    of_w_hh = None
    if needs[2]:
        h_prev = previous(h0, output, saved.batch_sizes, saved.reverse)
        if dropout is not None:
            h_prev = h_prev * torch.cat([dropout[:running] for running in saved.batch_sizes])
        of_w_hh = found.gates_h.t() @ h_prev

    of_c = [None if t is None else t.sum(0) for t in (found.ln_c, found.ln_c_bias)]
    return (
        found.gates_x @ w_ih if needs[0] else None,
        found.gates_x.t() @ input if needs[1] else None,
        of_w_hh,
        found.sum.sum(0) if needs[3] else None,
        found.sum.sum(0) if needs[4] else None,
        gradient_of_gain(found.sum, gates_x) if needs[5] else None,
        gradient_of_gain(found.sum, gates_h) if needs[6] else None,
        *(grad if need else None for grad, need in zip(of_c, needs[7:9], strict=True)),
        found.h0 if needs[9] else None,
        found.c0 if needs[10] else None,
    )


def step(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step for few rows in one launch: input [B, I], h and c [B, H] -> the next h and c."""
    tensors: dict[str, Tensor | None] = {"x": input, "h_prev": h, "c_prev": c, "w_ih": w_ih, "w_hh": w_hh}
    tensors |= {"b_ih": b_ih, "b_hh": b_hh}
    tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    h_next, c_next = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, c))
    with torch.cuda.device_of(h):
        native.CUDA.require().lstm_step(
            cuda.STORAGES[h.dtype],
            input.shape[0],
            input.shape[1],
            h.shape[1],
            cuda.addresses(tensors | {"h": h_next, "c": c_next}),
            cuda.stream(h.device),
        )
    return h_next, c_next
