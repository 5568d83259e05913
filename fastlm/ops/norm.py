"""What layer_norm and rms_norm have in common on a CPU: the native kernel and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.cpu import norm as kernel
from fastlm.ops.library import differentiable_once, needs_grad

__all__ = ["cpu_norm"]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centre: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        output, statistics = kernel.norm(input, weight, bias, eps, centre=centre, dtype=dtype, save=True)
        ctx.save_for_backward(input, weight, statistics)
        ctx.centre = centre
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("layer_norm" if ctx.centre else "rms_norm")
        wants = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        grads = kernel.norm_backward(grad_output, *ctx.saved_tensors, centre=ctx.centre, wants=wants)
        return *grads, None, None, None


def cpu_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    """The normalised rows of float32 `input`, with a gradient.

    Under bfloat16 autocast they are bfloat16, rounded once: what follows a norm casts them anyway, and the pass over
    memory that this takes is saved.
    """
    mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    dtype = torch.bfloat16 if mixed else torch.float32
    if needs_grad(input, weight, bias):
        result: Tensor = _Norm.apply(input, weight, bias, eps, centre, dtype)
        return result
    return kernel.norm(input, weight, bias, eps, centre=centre, dtype=dtype)[0]
