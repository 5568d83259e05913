"""Native root-mean-square normalisation: csrc/cpu/rms_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["rms_norm"]


def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of float32 input [..., dim], weight [dim]."""
    x = input.contiguous()
    w = None if weight is None else weight.contiguous()
    output = torch.empty_like(x)
    dim = x.shape[-1]
    native.CPU.require().rms_norm(
        x.data_ptr(),
        0 if w is None else w.data_ptr(),
        output.data_ptr(),
        x.numel() // dim if dim else 0,
        dim,
        eps,
        native.num_threads(),
    )
    return output
