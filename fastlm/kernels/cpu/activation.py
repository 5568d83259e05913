"""Native activations: csrc/cpu/activation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["activation", "why_not"]

_CODES = {"silu": 0, "gelu": 1}


def why_not(*inputs: Tensor) -> str | None:
    """What the kernel can't do. Shapes and dtypes agree among each other already."""
    if native.CPU.module is None:
        return native.CPU.error
    for tensor in inputs:
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return f"an input is {tensor.dtype} on {tensor.device}, the kernel takes float32 on the CPU"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return "a gradient is needed"
    return None


def activation(function: str, input: Tensor, factor: Tensor | None = None) -> Tensor:
    """f(input) * factor, elementwise; `function` is "silu" or "gelu" (the tanh form)."""
    x = input.contiguous()
    u = None if factor is None else factor.contiguous()
    output = torch.empty_like(x)
    native.CPU.require().activation(
        x.data_ptr(),
        0 if u is None else u.data_ptr(),
        output.data_ptr(),
        x.numel(),
        _CODES[function],
        native.num_threads(),
    )
    return output
