"""Native attention to a key-value cache: csrc/cpu/attention_decode.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import KV_TYPES

__all__ = ["Call", "attention_decode", "why_not"]

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
    call = Call(query, key_cache, value_cache, scale, window, softcap, slopes_stride)
    return call(query, key_cache, value_cache, lengths, rows, alibi_slopes)


class Call:
    """A call of `attention_decode` for all tensors of the same shapes, strides and dtypes as these.

    Args:
        query: its last dimension contiguous, as those of the caches.
        slopes_stride: H where ALiBi slopes are [B, H], else 0.
    """

    __slots__ = ("_run", "_shape", "_stride")

    def __init__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes_stride: int = 0,
    ) -> None:
        self._shape = query.shape
        heads, tokens, dim = self._shape[1:]
        # Contiguous as [B, T, H, D], which the projection behind it reads.
        self._stride = (tokens * heads * dim, dim, heads * dim, 1)
        self._run = native.CPU.require().AttentionDecode(
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

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        lengths: Tensor,
        rows: Tensor | None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Lengths, rows and slopes contiguous, the slopes float32."""
        output = torch.empty_strided(self._shape, self._stride, dtype=torch.float32, device=query.device)
        self._run(
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            lengths.data_ptr(),
            native.address(rows),
            native.address(slopes),
            output.data_ptr(),
            native.num_threads(),
        )
        return output
