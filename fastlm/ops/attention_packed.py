"""Self-attention straight from a fused query-key-value projection."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import attention as kernel
from fastlm.kernels.cpu.elementwise import convert
from fastlm.kernels.cpu.norm import norm, norm_backward
from fastlm.kernels.cpu.rotary import rotary as rotate
from fastlm.ops.attention import attention
from fastlm.ops.checks import describe
from fastlm.ops.library import differentiable_once, needs_grad, opaque_kernel_why_not, tracing
from fastlm.ops.registry import choosing
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import rotary as turn

Rotary: TypeAlias = tuple[Tensor, Tensor, bool]

__all__ = ["packed_attention"]

_BFLOAT_HEADS = 16
"""From so many key/value heads on, bfloat16 goes into the kernel as it is, each head on one thread; fewer become floats
beforehand, and threads share a head."""


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
        ctx: Any,
        packed: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
        rotary: Rotary | None,
        heads: tuple[int, int],
        options: tuple[Any, ...],
    ) -> Tensor:
        plain = query_norm is None and rotary is None
        direct = plain and packed.dtype is torch.bfloat16 and len(packed) * heads[1] >= _BFLOAT_HEADS
        query, key, value = _split(packed if direct else convert(packed, torch.float32), *heads)
        statistics: list[Tensor | None] = [None, None]
        if query_norm is not None:
            query, statistics[0], _ = norm(query, query_norm, None, eps, centre=False, save=True)
            key, statistics[1], _ = norm(key, key_norm, None, eps, centre=False, save=True)
        if rotary is not None:
            query, key = rotate(query, *rotary, None), rotate(key, *rotary, None)
        output, lse = kernel.attention(query, key, value, *options, save=True)
        turned = (None, None) if plain else (query, key)
        output = output.transpose(1, 2).flatten(2)
        ctx.save_for_backward(packed, output, lse, *turned, query_norm, key_norm, *statistics)
        ctx.rest = rotary, heads, options
        return convert(output, packed.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("packed_attention")
        packed, output, lse, query, key, query_norm, key_norm, *statistics = ctx.saved_tensors
        rotary, heads, options = ctx.rest
        inputs = convert(packed, output.dtype)
        given, grad = _split(inputs, *heads), torch.empty_like(inputs)
        places = _split(grad, *heads)
        plain = query is None
        out = places if plain else (torch.empty_like(query), torch.empty_like(key), places[2])
        grad_output, output = (
            t.unflatten(2, (heads[0], -1)).transpose(1, 2) for t in (convert(grad_output, output.dtype), output)
        )
        first = given[:2] if plain else (query, key)
        kernel.attention_backward(grad_output, *first, given[2], output, lse, *options, out=out)
        norm_grads: list[Tensor | None] = [None, None]
        for i, weight in enumerate(() if plain else (query_norm, key_norm)):
            found = out[i]
            if rotary is not None:  # turned back
                cos, sin, interleaved = rotary
                found = rotate(found, cos, -sin, interleaved, None)
            if weight is not None:
                found, norm_grads[i], _ = norm_backward(
                    found, given[i], weight, statistics[i], centre=False, wants=(True, False)
                )
            places[i].copy_(found)
        return convert(grad, packed.dtype), *norm_grads, None, None, None, None


def _native(packed: Tensor, norms: tuple[Tensor, Tensor] | None, rotary: Rotary | None, dropout_p: float) -> bool:
    if tracing() or dropout_p > 0 or not choosing() or not needs_grad(packed):
        return False
    dtype = torch.bfloat16 if packed.dtype is torch.bfloat16 else torch.float32
    others = (*(norms or ()), *(rotary[:2] if rotary else ()))
    return (
        packed.is_contiguous()
        and opaque_kernel_why_not(native.CPU, packed, dtypes=(dtype,)) is None
        and opaque_kernel_why_not(native.CPU, *others) is None
        and not (rotary and needs_grad(*rotary[:2]))
    )


def packed_attention(
    packed: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    norms: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-5,
    rotary: Rotary | None = None,
) -> Tensor:
    """`attention` of the query, key and value that one projection gave, its result as the next projection takes it.

    On a CPU and with gradients nothing is copied on the way, and a bfloat16 input (autocast) is computed in float32.

    Args:
        packed: [B, T, (H + 2 KVH) D]: each token's H query heads, then KVH key heads, then KVH value heads.
        num_heads: H.
        num_kv_heads: KVH, dividing H.
        causal, scale, window, dropout_p: as in `attention`.
        norms: each query and key head goes through `rms_norm` with these weights, [D] each, and `norm_eps`.
        rotary: cos, sin and interleaved as `ops.rotary` takes them; queries and keys are then rotated.

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
    query_norm, key_norm = norms or (None, None)
    if _native(packed, norms, rotary, dropout_p):
        scale = (packed.shape[2] // every) ** -0.5 if scale is None else scale
        options = causal, None, scale, window, None, None
        result: Tensor = _PackedAttention.apply(
            packed, query_norm, key_norm, norm_eps, rotary, (num_heads, num_kv_heads), options
        )
        return result
    query, key, value = _split(packed, num_heads, num_kv_heads)
    if norms is not None:
        query, key = rms_norm(query, query_norm, eps=norm_eps), rms_norm(key, key_norm, eps=norm_eps)
    if rotary is not None:
        cos, sin, interleaved = rotary
        query, key = (turn(x, cos, sin, interleaved=interleaved) for x in (query, key))
    output = attention(query, key, value, causal=causal, scale=scale, window=window, dropout_p=dropout_p)
    return output.transpose(1, 2).flatten(2)
