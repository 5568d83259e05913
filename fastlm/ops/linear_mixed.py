"""Linear layers of a training step under bfloat16 autocast on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import convert
from fastlm.ops.library import differentiable_once, needs_grad, opaque_kernel_why_not
from fastlm.ops.registry import choosing

__all__ = ["differentiate", "is_mixed", "mixed_linear", "product"]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for bfloat16 x [N, K] and weight; the bias is float32."""
    return x @ weight.t() if bias is None else torch.addmm(convert(bias, torch.bfloat16), x, weight.t())


def differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, wants: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `product` for its own, [N, M]: of x in bfloat16, of the layer's weight and bias in float32."""
    return (
        grad @ weight if wants[0] else None,
        convert(grad.t() @ x, torch.float32) if wants[1] else None,
        convert(grad.sum(dim=0), torch.float32) if wants[2] else None,
    )


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, w = convert(input, torch.bfloat16).reshape(-1, input.shape[-1]), convert(weight, torch.bfloat16)
        ctx.save_for_backward(x, w)
        ctx.input = input.shape, input.dtype
        return product(x, w, bias).view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("linear")
        x, w = ctx.saved_tensors
        shape, dtype = ctx.input
        g = convert(grad_output, torch.bfloat16).reshape(-1, len(w))
        grad_input, *grads = differentiate(g, x, w, ctx.needs_input_grad)
        return None if grad_input is None else convert(grad_input, dtype).view(shape), *grads


def is_mixed(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether `mixed_linear` can stand for such a layer: bfloat16 autocast on a CPU, and a gradient is wanted."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and choosing()
        and input.dtype in (torch.float32, torch.bfloat16)
        and input.numel() > 0
        and needs_grad(input, *parameters)
        and opaque_kernel_why_not(native.CPU, input, dtypes=(input.dtype,)) is None
        and opaque_kernel_why_not(native.CPU, *parameters) is None
    )


def mixed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in bfloat16 of float32 weights: what autocast makes of a linear layer, to the bit, in less time.

    Our conversions are several times quicker than torch's, and one node of autograd's graph stands for five.
    """
    result: Tensor = _MixedLinear.apply(input, weight, bias)
    return result
