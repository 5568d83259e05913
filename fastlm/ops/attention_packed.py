"""Self-attention straight from a fused query-key-value projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import attention as kernel
from fastlm.ops.attention import attention
from fastlm.ops.checks import describe
from fastlm.ops.library import differentiable_once, needs_grad, opaque_kernel_why_not, tracing
from fastlm.ops.registry import choosing

__all__ = ["packed_attention"]


def _split(packed: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, T, D] of the query, key and value in [B, T, (heads + 2 kv_heads) D]."""
    batch, tokens, width = packed.shape
    every = packed.view(batch, tokens, heads + 2 * kv_heads, width // (heads + 2 * kv_heads)).transpose(1, 2)
    return every[:, :heads], every[:, heads:-kv_heads], every[:, -kv_heads:]


class _PackedAttention(torch.autograd.Function):
    """The gradients of query, key and value are written where they lie in the gradient of the projection: nothing is
    split, and nothing put together again."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, heads: int, kv_heads: int, causal: bool, scale: float, window: int | None
    ) -> Tensor:
        options = causal, None, scale, window, None, None
        output, lse = kernel.attention(*_split(packed.float(), heads, kv_heads), *options, save=True)
        ctx.save_for_backward(packed, output, lse)
        ctx.options = heads, kv_heads, options
        return output.transpose(1, 2).flatten(2).to(packed.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("packed_attention")
        packed, output, lse = ctx.saved_tensors
        heads, kv_heads, options = ctx.options
        inputs = packed.float()
        grad = torch.empty_like(inputs)
        grad_output = grad_output.float().unflatten(2, (heads, -1)).transpose(1, 2)
        kernel.attention_backward(
            grad_output, *_split(inputs, heads, kv_heads), output, lse, *options, out=_split(grad, heads, kv_heads)
        )
        return grad.to(packed.dtype), None, None, None, None, None


def _native(packed: Tensor, dropout_p: float) -> bool:
    if tracing() or dropout_p > 0 or not choosing() or not needs_grad(packed):
        return False
    dtype = torch.bfloat16 if packed.dtype is torch.bfloat16 else torch.float32
    return packed.is_contiguous() and opaque_kernel_why_not(native.CPU, packed, dtypes=(dtype,)) is None


def packed_attention(
    packed: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` of the query, key and value that one projection gave, its result as the next projection takes it.

    On a CPU and with gradients nothing is copied on the way, and a bfloat16 input (autocast) is computed in float32.

    Args:
        packed: [B, T, (H + 2 KVH) D]: each token's H query heads, then KVH key heads, then KVH value heads.
        num_heads: H.
        num_kv_heads: KVH, dividing H.
        causal, scale, window, dropout_p: as in `attention`.

    Returns:
        [B, T, H D], in the dtype of `packed`.

    Raises:
        ValueError: the heads don't fit; and as `attention`.
    """
    every = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"packed_attention: num_kv_heads is {num_kv_heads}, expected a divisor of {num_heads}")
    if packed.dim() != 3 or 0 in packed.shape or packed.shape[2] % every or not packed.is_floating_point():
        raise ValueError(f"packed_attention: packed is {describe(packed)}, expected floats [B, T, {every} D]")
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: window is {window}, expected at least 1")
    if _native(packed, dropout_p):
        scale = (packed.shape[2] // every) ** -0.5 if scale is None else scale
        result: Tensor = _PackedAttention.apply(packed, num_heads, num_kv_heads, causal, scale, window)
        return result
    query, key, value = _split(packed, num_heads, num_kv_heads)
    output = attention(query, key, value, causal=causal, scale=scale, window=window, dropout_p=dropout_p)
    return output.transpose(1, 2).flatten(2)
