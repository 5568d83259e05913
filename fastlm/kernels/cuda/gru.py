"""The GRU's cell on a GPU: two products by cuBLAS and one kernel, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import cuda, native

__all__ = ["cell_backward", "cell_forward"]


def _launch(kernel: str, h: Tensor, tensors: dict[str, Tensor | None]) -> None:
    with torch.cuda.device_of(h):
        function = getattr(native.CUDA.require(), kernel)
        function(cuda.STORAGES[h.dtype], *h.shape, cuda.addresses(tensors), cuda.stream(h.device))


def cell_forward(
    input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """input [B, I], h [B, H] -> the next h, and the products W_ih x and W_hh h [B, 3H] that the backward needs."""
    gates_x, gates_h = input @ w_ih.t(), h @ w_hh.t()
    h = h.contiguous()
    h_next = torch.empty_like(h)
    _launch(
        "gru_cell",
        h,
        {"gates_x": gates_x, "gates_h": gates_h, "b_ih": b_ih, "b_hh": b_hh, "h_prev": h, "h": h_next},
    )
    return h_next, gates_x, gates_h


def cell_backward(
    grad_h: Tensor, gates_x: Tensor, gates_h: Tensor, h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two products, and of h but for what comes through them."""
    h = h.contiguous()
    grad_gates_x, grad_gates_h, grad_h_prev = (torch.empty_like(t) for t in (gates_x, gates_h, h))
    tensors = {"gates_x": gates_x, "gates_h": gates_h, "b_ih": b_ih, "b_hh": b_hh, "h_prev": h}
    results = {"grad_gates_x": grad_gates_x, "grad_gates_h": grad_gates_h, "grad_h_prev": grad_h_prev}
    _launch("gru_cell_backward", h, {**tensors, **results, "grad_h": grad_h.contiguous()})
    return grad_gates_x, grad_gates_h, grad_h_prev
