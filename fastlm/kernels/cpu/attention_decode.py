"""Native attention to a key-value cache: csrc/cpu/attention_decode.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import KV_TYPES

__all__ = ["attention_decode", "forget", "known", "remember", "why_not"]

_MAX_DIM = 256


def why_not(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> str | None:
    """What the kernel can't do. Shapes and dtypes agree among each other already."""
    if native.CPU.module is None:
        return native.CPU.error
    if query.dtype != torch.float32 or key_cache.dtype not in KV_TYPES:
        return f"the query is {query.dtype}, the cache {key_cache.dtype}; the kernel takes float32 queries"
    for tensor in (query, key_cache, value_cache, lengths, rows, alibi_slopes):
        if tensor is not None and not tensor.is_cpu:
            return f"a tensor is on {tensor.device}"
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key_cache, value_cache, alibi_slopes)
    ):
        return "a gradient is needed"
    if not 1 <= query.shape[3] <= _MAX_DIM:
        return f"heads of {query.shape[3]} features, the kernel takes 1 to {_MAX_DIM}"
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        return "the last dimension of a cache is not contiguous"
    return None


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention of query [B, H, T, D] to caches [R, KVH, S, D]; see `fastlm.ops.attention_decode`."""
    if query.stride(3) != 1:
        query = query.contiguous()
    lengths = lengths.contiguous()
    if rows is not None:
        rows = rows.contiguous()
    slopes_stride = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(torch.float32).contiguous()
        slopes_stride = query.shape[1] if alibi_slopes.dim() == 2 else 0
    output = torch.empty_strided(query.shape, _strides(query), dtype=torch.float32, device=query.device)
    _plan(query, key_cache, value_cache, scale, window, softcap, slopes_stride)(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        lengths.data_ptr(),
        native.address(rows),
        native.address(alibi_slopes),
        output.data_ptr(),
        native.num_threads(),
    )
    return output


def _strides(query: Tensor) -> tuple[int, ...]:
    """Of an output [B, H, T, D], contiguous as [B, T, H, D], which the projection behind it reads."""
    _, heads, tokens, dim = query.shape
    return tokens * heads * dim, dim, heads * dim, 1


def _plan(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes_stride: int = 0,
) -> Any:
    """A call without its addresses. The last dimension of queries and caches is contiguous."""
    return native.CPU.require().AttentionDecode(
        query.shape,
        query.stride(),
        KV_TYPES[key_cache.dtype],
        key_cache.shape,
        key_cache.stride(),
        value_cache.stride(),
        slopes_stride,
        scale,
        softcap or 0.0,
        window or 0,
    )


# (query, key_cache, value_cache, lengths, rows, scale, window, softcap, threads): the output if these options and
# tensors of these dtypes, shapes and strides were remembered, else None. None are where torch does not show its
# tensors to native code.
known: Callable[..., Tensor | None] | None = None
if native.shows_tensors():
    known = native.CPU.require().attention_decode_known


def remember(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Lets `known` serve calls like this one, which was checked and which `why_not` has nothing against. Queries have
    contiguous features; lengths and rows are contiguous."""
    native.CPU.require().attention_decode_remember(
        _plan(query, key_cache, value_cache, query.shape[3] ** -0.5 if scale is None else scale, window, softcap),
        (query, key_cache, value_cache, lengths, rows, scale, window, softcap),
        torch.empty_strided,
        tuple(query.shape),
        _strides(query),
        torch.float32,
        query.device,
    )


def forget() -> int:
    """Forgets what was remembered; returns how many calls that were."""
    return int(native.CPU.require().attention_decode_forget())
