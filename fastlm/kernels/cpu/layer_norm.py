"""Native layer normalisation: csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["layer_norm"]


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of float32 [..., dim]."""
    x = input.contiguous()
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = torch.empty_like(x)
    dim = x.shape[-1]
    native.CPU.require().layer_norm(
        x.data_ptr(),
        0 if w is None else w.data_ptr(),
        0 if b is None else b.data_ptr(),
        output.data_ptr(),
        x.numel() // dim if dim else 0,
        dim,
        eps,
        native.num_threads(),
    )
    return output
