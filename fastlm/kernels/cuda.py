"""The CUDA kernels, on tensors: csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["lstm_cell", "unavailable"]


def unavailable() -> str | None:
    """Why no CUDA kernel can run in this process; None where they can."""
    if native.CUDA.module is None:
        return native.CUDA.error
    return None if torch.cuda.is_available() else "there is no CUDA device that torch can use"


def lstm_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step: input [B, I], h and c [B, H] float32 on one CUDA device -> the next h and c.

    Two matrix products by cuBLAS, then one kernel for biases, gates and state, on torch's current stream.
    """
    gates = torch.addmm(input @ w_ih.t(), h, w_hh.t())
    bias = b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh
    if bias is not None:
        bias = bias.contiguous()
    c = c.contiguous()
    h_out, c_out = torch.empty_like(c), torch.empty_like(c)
    with torch.cuda.device(input.device):
        native.CUDA.require().lstm_cell(
            gates.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            c.data_ptr(),
            h_out.data_ptr(),
            c_out.data_ptr(),
            *c.shape,
            torch.cuda.current_stream(input.device).cuda_stream,
        )
    return h_out, c_out
