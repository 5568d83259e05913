"""Linear layers of a training step under bfloat16 autocast on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import convert
from fastlm.kernels.cpu.matmul import matmul, worthwhile
from fastlm.ops.library import differentiable_once, needs_grad, opaque_kernel_why_not
from fastlm.ops.registry import choosing

__all__ = ["differentiate", "is_mixed", "mixed_linear", "prepared", "product", "rows"]


def prepared(weight: Tensor) -> Tensor:
    """The weight as `product` and `differentiate` take it: rounded to bfloat16, unless they do that on their way."""
    return weight.contiguous() if worthwhile(weight) else convert(weight, torch.bfloat16)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in bfloat16, of bfloat16 x [N, K] and a `prepared` weight; the bias is float32."""
    if worthwhile(weight):
        return matmul(x, weight, turn_b=True, bias=None if bias is None else bias.contiguous())
    weight = convert(weight, torch.bfloat16)
    return x @ weight.t() if bias is None else torch.addmm(convert(bias, torch.bfloat16), x, weight.t())


def differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, wants: Sequence[bool], dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `product` for its own, [N, M], float32 or bfloat16: of x in `dtype`, of the layer's weight and bias
    in float32."""
    grad_x = grad_weight = None
    if not (worthwhile(weight) and worthwhile(x)):
        grad = convert(grad, torch.bfloat16)
    if wants[0] and worthwhile(weight):
        grad_x = matmul(grad, weight, dtype=dtype)
    elif wants[0]:
        grad_x = convert(grad @ convert(weight, torch.bfloat16), dtype)
    if wants[1] and worthwhile(x):
        grad_weight = matmul(grad, x, turn_a=True, dtype=torch.float32)
    elif wants[1]:
        grad_weight = convert(grad.t() @ x, torch.float32)
    return grad_x, grad_weight, convert(grad.sum(dim=0), torch.float32) if wants[2] else None


def rows(tensor: Tensor) -> Tensor:
    """[..., K] as contiguous rows."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, w = rows(convert(input, torch.bfloat16)), prepared(weight)
        ctx.save_for_backward(x, w)
        ctx.input = input.shape, input.dtype
        return product(x, w, bias).view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("linear")
        x, w = ctx.saved_tensors
        shape, dtype = ctx.input
        grad_input, *grads = differentiate(rows(grad_output), x, w, ctx.needs_input_grad, dtype)
        return None if grad_input is None else grad_input.view(shape), *grads


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
    """x W^T + b in bfloat16 of float32 weights: what autocast makes of a linear layer, in less time.

    Our conversions are several times quicker than torch's, one node of autograd's graph stands for five, and a small
    product costs less than what oneDNN does before it. The gradient of the weight is not rounded to bfloat16.
    """
    result: Tensor = _MixedLinear.apply(input, weight, bias)
    return result
