"""The GRU on a GPU, for what cuDNN can't do (layer normalisation, recurrent dropout, zoneout); and single steps.

Packed sequences are those of `fastlm.kernels.cpu.recurrent`. Tensors are on one device, of one of `cuda.STORAGES`; they
need not be contiguous. The products that take all steps at once are cuBLAS's; the recurrence is a product and a kernel
for each step, forward and backward: unlike the LSTM, it has no kernel for a whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import cuda
from fastlm.kernels.cuda.steps import (
    final,
    gradient_of_gain,
    initial_gradient,
    previous,
    product_backward,
    steps,
    times,
)

__all__ = ["Saved", "layer_backward", "layer_forward"]


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, dropout, zoneout_h, h0, output, gates_x and gates_h [N, 3H], the two
    products."""
    batch_sizes: Sequence[int]
    reverse: bool


@cuda.without_autocast
def layer_forward(
    input: Tensor,
    batch_sizes: Sequence[int],
    weights: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
    h0: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """One direction of one layer over a packed sequence.

    Args:
        input: [N, I], of `batch_sizes` rows at each time.
        weights: w_ih [3H, I], w_hh [3H, H], b_ih and b_hh [3H] or None.
        norms: the gains ln_ih and ln_hh [3H], or None for both.
        noise: the mask [B, H] and the shares of h [N, H], each or None.
        h0: [B, H].
        reverse: from the last time to the first.
        save: whether `layer_backward` will be called.

    Returns:
        output [N, H], h_n [B, H] and, with `save`, what the backward needs.
    """
    tensors = [None if t is None else t.detach().contiguous() for t in (input, *weights, *norms, *noise, h0)]
    input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, dropout, zoneout_h, h0 = tensors  # type: ignore[assignment]
    assert w_ih is not None and w_hh is not None
    gates_x = input @ w_ih.t()
    output = input.new_empty(len(input), h0.shape[1])
    gates_h = torch.empty_like(gates_x) if save else None
    parameters = {"b_ih": b_ih, "b_hh": b_hh, "ln_ih": ln_ih, "ln_hh": ln_hh}
    for at, h in steps(h0, output, batch_sizes, reverse):
        masked = h if dropout is None else h * dropout[: len(h)]
        product = torch.mm(masked, w_hh.t(), out=None if gates_h is None else gates_h[at])
        given = {"gates_x": gates_x[at], "gates_h": product, "h_prev": h, "h": output[at]}
        shares = {"zoneout_h": None if zoneout_h is None else zoneout_h[at]}
        cuda.launch_cell("gru_cell", h, given | shares | parameters)
    saved = Saved((*tensors, output, gates_x, gates_h), batch_sizes, reverse) if save else None
    return output, final(output, batch_sizes, reverse), saved


@cuda.without_autocast
def layer_backward(saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of `layer_forward`, given those of output and h_n (None: zero). Deterministic.

    Args:
        saved: from `layer_forward`.
        grads: [N, H], [B, H].
        needs: which of the results to compute, in their order.

    Returns:
        Those of input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, h0.
    """
    input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, dropout, zoneout_h, h0, output, gates_x, gates_h = saved.tensors
    assert input is not None and w_ih is not None and w_hh is not None
    assert h0 is not None and output is not None and gates_x is not None and gates_h is not None
    layout = saved.batch_sizes, saved.reverse
    grad_output, grad_h_n = grads
    h_prev = previous(h0, output, *layout)
    of_h = initial_gradient(h0, grad_h_n)
    of_x, of_g = torch.empty_like(gates_x), torch.empty_like(gates_h)
    of_gates_x, of_gates_h = (of_x, of_g) if ln_ih is None else (torch.empty_like(of_x), torch.empty_like(of_g))
    by_rows: dict[str, Tensor | None] = {"gates_x": gates_x, "gates_h": gates_h, "h_prev": h_prev}
    by_rows |= {"zoneout_h": zoneout_h, "grad_sum_x": of_x, "grad_sum_h": of_g}
    if ln_ih is not None:
        by_rows |= {"grad_gates_x": of_gates_x, "grad_gates_h": of_gates_h}
    parameters = {"b_ih": b_ih, "b_hh": b_hh, "ln_ih": ln_ih, "ln_hh": ln_hh}
    for at in reversed(times(*layout)):
        h = of_h[: at.stop - at.start]
        if grad_output is not None:
            h += grad_output[at]
        of_step = {name: None if t is None else t[at] for name, t in by_rows.items()}
        cuda.launch_cell("gru_cell_backward", h, of_step | parameters | {"grad_h": h, "grad_h_prev": h})
        product_backward(h, of_gates_h[at], w_hh, dropout)
    if needs[2] and dropout is not None:
        h_prev = h_prev * torch.cat([dropout[:running] for running in saved.batch_sizes])
    return (
        of_gates_x @ w_ih if needs[0] else None,
        of_gates_x.t() @ input if needs[1] else None,
        of_gates_h.t() @ h_prev if needs[2] else None,
        of_x.sum(0) if needs[3] else None,
        of_g.sum(0) if needs[4] else None,
        gradient_of_gain(of_x, gates_x) if needs[5] else None,
        gradient_of_gain(of_g, gates_h) if needs[6] else None,
        of_h if needs[7] else None,
    )
