"""What the norms have in common on a CPU: the native kernel and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.cpu import norm as kernel
from fastlm.ops.library import differentiable_once, needs_grad

__all__ = ["cpu_add_norm", "cpu_norm"]


class _Norm(torch.autograd.Function):
    """The norm of `input`, or of its sum with `added`, and that sum."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        added: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centre: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        output, statistics, total = kernel.norm(
            input, weight, bias, eps, centre=centre, dtype=dtype, save=True, added=added
        )
        ctx.save_for_backward(input if total is None else total, weight, statistics)
        ctx.centre = centre
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable_once("layer_norm" if ctx.centre else "rms_norm")
        if grad_output is None:
            return grad_total, grad_total, None, None, None, None, None
        wants = (ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        grad, *grads = kernel.norm_backward(
            grad_output, *ctx.saved_tensors, centre=ctx.centre, wants=wants, grad_total=grad_total
        )
        return grad, grad if ctx.needs_input_grad[1] else None, *grads, None, None, None


def _dtype() -> torch.dtype:
    """Of the normalised rows: under bfloat16 autocast bfloat16, rounded once.

    What follows a norm casts them anyway, and the pass over memory that this takes is saved.
    """
    mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return torch.bfloat16 if mixed else torch.float32


def cpu_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    """The normalised rows of float32 `input`, with a gradient; bfloat16 under such autocast."""
    if needs_grad(input, weight, bias):
        result: Tensor = _Norm.apply(input, None, weight, bias, eps, centre, _dtype())[0]
        return result
    return kernel.norm(input, weight, bias, eps, centre=centre, dtype=_dtype())[0]


def cpu_add_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centre: bool
) -> tuple[Tensor, Tensor]:
    """As `cpu_norm` of input + residual, and that sum; `residual` is float32, `input` that or bfloat16."""
    if needs_grad(input, residual, weight, bias):
        result: tuple[Tensor, Tensor] = _Norm.apply(residual, input, weight, bias, eps, centre, _dtype())
        return result
    output, _, total = kernel.norm(residual, weight, bias, eps, centre=centre, dtype=_dtype(), added=input)
    assert total is not None
    return output, total
