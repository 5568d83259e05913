"""Linear layers of a training step under bfloat16 autocast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import convert
from fastlm.ops.library import differentiable_once, needs_grad, opaque_kernel_why_not
from fastlm.ops.registry import choosing

__all__ = ["is_mixed", "mixed_linear"]


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, w = convert(input, torch.bfloat16).reshape(-1, input.shape[-1]), convert(weight, torch.bfloat16)
        y = x @ w.t() if bias is None else torch.addmm(convert(bias, torch.bfloat16), x, w.t())
        ctx.save_for_backward(x, w)
        ctx.input = input.shape, input.dtype
        return y.view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("linear")
        x, w = ctx.saved_tensors
        shape, dtype = ctx.input
        g = convert(grad_output, torch.bfloat16).reshape(-1, len(w))
        want_input, want_weight, want_bias = ctx.needs_input_grad
        return (
            convert(g @ w, dtype).view(shape) if want_input else None,
            convert(g.t() @ x, torch.float32) if want_weight else None,
            convert(g.sum(dim=0), torch.float32) if want_bias else None,
        )


def is_mixed(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `mixed_linear` can stand for this layer: bfloat16 autocast on a CPU, and a gradient is wanted."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and choosing()
        and input.dtype in (torch.float32, torch.bfloat16)
        and input.numel() > 0
        and needs_grad(input, weight, bias)
        and opaque_kernel_why_not(native.CPU, input, dtypes=(input.dtype,)) is None
        and opaque_kernel_why_not(native.CPU, weight, bias) is None
    )


def mixed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in bfloat16 of float32 weights: what autocast makes of a linear layer, to the bit, in less time.

    Our conversions are several times quicker than torch's, and one node of autograd's graph stands for five.
    """
    result: Tensor = _MixedLinear.apply(input, weight, bias)
    return result
