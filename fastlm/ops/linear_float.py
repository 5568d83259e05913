"""Linear layers of many rows in float32 on a CPU whose tile unit (AMX) multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.matmul import float_matmul, float_worthwhile, product
from fastlm.ops.library import needs_grad, opaque_kernel_why_not

__all__ = ["float_apart", "float_linear", "float_linear_why_not"]


class _FloatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_input, of_weight, _ = ctx.needs_input_grad
        # No more than the wanted gradients need: the rest may be changed or freed meanwhile.
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)
        ctx.shape = input.shape
        return _forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        # With create_graph=True these have gradients of their own, which torch knows.
        multiply = torch.mm if torch.is_grad_enabled() else product
        grad_input = None if weight is None else multiply(grad, weight).view(ctx.shape)
        grad_weight = None if input is None else multiply(grad.t(), input.reshape(-1, ctx.shape[-1]))
        return grad_input, grad_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = input.reshape(-1, input.shape[-1])
    bias = None if bias is None else bias.float().contiguous()
    return float_matmul(x, weight.t(), bias=bias).view(*input.shape[:-1], len(weight))


_APART = 32
"""Tokens from which a batch of sequences that is only read takes this way. Each decides for itself, so that the batch
does not change its bits: one of 32 to 63 alone is slower than torch's, several together twice as fast as one by one."""


def float_apart(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether sequences of so many tokens, no gradient being wanted, go by the tile unit in any batch."""
    return tokens >= _APART and float_worthwhile(_MANY, outputs, inputs, dtype)


_MANY = 1 << 20


def float_linear_why_not(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why `float_linear` does not take this call, or is not the quickest that does; None where it is."""
    rows = input.numel() // max(input.shape[-1], 1)
    if input.dim() == 3 and not needs_grad(input, weight, bias):
        rows = _MANY if input.shape[1] >= _APART else 0
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
