"""Native activations: csrc/cpu/activation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["activation", "activation_backward"]

_CODES = {"silu": 0, "gelu": 1}


def activation(function: str, input: Tensor, factor: Tensor | None = None) -> Tensor:
    """f(input) * factor, elementwise; `function` is "silu" or "gelu" (the tanh form). float32 or bfloat16."""
    x = input.contiguous()
    u = None if factor is None else factor.contiguous()
    output = x.new_empty(x.shape)
    native.CPU.require().activation(
        x.data_ptr(),
        native.address(u),
        output.data_ptr(),
        x.numel(),
        _CODES[function],
        x.dtype is torch.bfloat16,
        native.num_threads(),
    )
    return output


def activation_backward(
    function: str, grad_output: Tensor, input: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of input and factor."""
    g, x = grad_output.contiguous(), input.contiguous()
    u = None if factor is None else factor.contiguous()
    grad_input, grad_factor = torch.empty_like(x), None if u is None else torch.empty_like(u)
    native.CPU.require().activation_backward(
        g.data_ptr(),
        x.data_ptr(),
        native.address(u),
        grad_input.data_ptr(),
        native.address(grad_factor),
        x.numel(),
        _CODES[function],
        x.dtype is torch.bfloat16,
        native.num_threads(),
    )
    return grad_input, grad_factor
