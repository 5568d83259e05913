"""Linear layers of many rows in float32 on a CPU whose tile unit (AMX) multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.matmul import float_matmul, float_worthwhile, product
from fastlm.ops.library import needs_grad, opaque_kernel_why_not

__all__ = ["float_linear", "float_linear_why_not"]


class _FloatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad, x = grad_output.reshape(-1, len(weight)), input.reshape(-1, weight.shape[1])
        # With create_graph=True these have gradients of their own, which torch knows.
        multiply = torch.mm if torch.is_grad_enabled() else product
        grad_input = multiply(grad, weight).view(input.shape) if wants[0] else None
        grad_weight = multiply(grad.t(), x) if wants[1] else None
        return grad_input, grad_weight, grad.sum(dim=0) if wants[2] else None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = input.reshape(-1, input.shape[-1])
    bias = None if bias is None else bias.float().contiguous()
    return float_matmul(x, weight.t(), bias=bias).view(*input.shape[:-1], len(weight))


def float_linear_why_not(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why `float_linear` does not take this call, or is not the quickest that does; None where it is."""
    rows = input.numel() // max(input.shape[-1], 1)
    if not float_worthwhile(rows, weight.shape[0], weight.shape[1], weight.dtype):
        return "a tile unit (AMX) for it does not pay or is not there"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast"
    if needs_grad(input, weight, bias) and weight.dtype is not torch.float32:
        return "a gradient is wanted"
    reason = opaque_kernel_why_not(native.CPU, input, bias)
    return reason or opaque_kernel_why_not(native.CPU, weight, dtypes=(torch.float32, torch.float16, torch.bfloat16))


def float_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in float32 by three bfloat16 parts of each float: csrc/cpu/amx.h.

    Args:
        input: [..., K], float32.
        weight: [N, K], float32 or, where no gradient is wanted, float16 or bfloat16, which take fewer products.
        bias: [N], float32, or None.

    Returns:
        [..., N].
    """
    if needs_grad(input, weight, bias):
        result: Tensor = _FloatLinear.apply(input, weight, bias)
        return result
    return _forward(input, weight, bias)
