"""Attention of new tokens to a key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlm.kernels import native
from fastlm.kernels.cpu import attention_decode as cpu
from fastlm.ops.attention import check_options
from fastlm.ops.attention_kernels import ATTENTION
from fastlm.ops.checks import describe
from fastlm.ops.kv_cache import int8_why_not
from fastlm.ops.library import (
    autograd_by_reference,
    needs_grad,
    tracing,
    triton_kernel,
    triton_why_not,
    undisturbed,
)
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import attention_decode as reference
from fastlm.reference.kv_cache import kv_dtypes, kv_read, kv_width

__all__ = ["attention_decode", "triton_cache_why_not"]


def _torch_run(
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
    """Attention to the whole cache under a mask: never looks at the lengths' values, so no device has to wait."""
    batch, tokens = query.shape[0], query.shape[2]
    positions = torch.arange(key_cache.shape[2], device=query.device)
    query_positions = lengths[:, None] - tokens + torch.arange(tokens, device=query.device)
    distance = (positions - query_positions[:, :, None])[:, None]  # [B, 1, T, S]
    visible = distance <= 0
    if window is not None:
        visible &= distance > -window
    mask = visible
    if alibi_slopes is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = alibi_slopes.to(wide).reshape(-1, query.shape[1], 1, 1) * distance
        mask = bias.masked_fill(~visible, -torch.inf)
    # What lies beyond a row's length may be anything, NaN too, which a weight of 0 would not silence.
    stored = (positions < lengths[:, None])[:, None, :, None]
    key, value = (
        torch.where(stored, kv_read(cache[:batch] if rows is None else cache[rows], query.dtype), 0.0)
        for cache in (key_cache, value_cache)
    )
    result: Tensor = ATTENTION(query, key, value, False, mask, scale, None, softcap, None, 0.0)
    return result


def _torch_why_not(query: Tensor, *_: Any) -> str | None:
    if query.device.type == "cpu":
        return "on a CPU it would copy the whole cache, where the reference reads what is stored"
    return None


def triton_cache_why_not(query: Tensor, keys: Tensor, values: Tensor, *others: Tensor | None) -> str | None:
    """What the Triton decoding kernel can't do; `others` are the call's remaining tensors."""
    if needs_grad(query, keys, values, *others):
        return "a gradient is wanted"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the query is {query.dtype}; the kernel takes float32, float16 and bfloat16"
    if keys.dtype not in (query.dtype, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        return f"the cache is {keys.dtype}; the kernel takes the query's dtype, bfloat16, int8 and float8_e4m3fn"
    if not 1 <= query.shape[3] <= 256:
        return f"heads of {query.shape[3]} features, the kernel takes 1 to 256"
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the last dimension of a cache is not contiguous"
    return int8_why_not(keys, values) or triton_why_not(query, keys, values, *others)


def _triton_why_not(
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
    return triton_cache_why_not(query, key_cache, value_cache, lengths, rows, alibi_slopes)


ATTENTION_DECODE = Op(
    "attention_decode",
    [
        Implementation("cpu", cpu.attention_decode, cpu.why_not),
        Implementation("triton", triton_kernel("attention_decode", "attention_decode"), _triton_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", reference.attention_decode, always),
    ],
)


@torch.library.custom_op("fastlm::attention_decode", mutates_args=())
def _attention_decode(
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
    result: Tensor = ATTENTION_DECODE(
        query, key_cache, value_cache, lengths, rows, scale, window, softcap, alibi_slopes
    ).contiguous()
    return result


@_attention_decode.register_fake
def _(
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
    return query.new_empty(query.shape)


autograd_by_reference(_attention_decode, _torch_run, differentiable=(0, 1, 2, 8))


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, rows: Tensor | None) -> None:
    # Once per layer and token: each shape is fetched once.
    shape, cache_shape, dtype = query.shape, key_cache.shape, query.dtype
    if len(shape) != 4:
        raise ValueError(f"attention_decode: query is {describe(query)}, expected shape [B, H, T, D]")
    batch, heads, _, dim = shape
    kind = key_cache.dtype
    width = kv_width(dim, kind)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if (
            cache.shape != cache_shape
            or len(cache_shape) != 4
            or cache_shape[3] != width
            or kind not in kv_dtypes(dtype)
            or cache.dtype != kind
        ):
            raise ValueError(
                f"attention_decode: {name} is {describe(cache)}, expected {dtype} of shape [R, KVH, S, {width}], "
                "the same for keys and values"
            )
    cache_rows, kv_heads = cache_shape[:2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention_decode: key_cache has {kv_heads} heads, expected a divisor of the query's {heads}")
    for name, index in (("lengths", lengths), ("rows", rows)):
        if index is not None and (index.shape != (batch,) or index.dtype != torch.int64):
            raise ValueError(f"attention_decode: {name} is {describe(index)}, expected int64 of shape [{batch}]")
    if rows is None and batch > cache_rows:
        raise ValueError(
            f"attention_decode: key_cache has {cache_rows} rows, expected {batch}, one per batch entry, "
            "or `rows` to choose them"
        )


def _as_they_are(query: Tensor, *indices: Tensor | None) -> bool:
    """Whether the kernel can read these without a copy."""
    return query.stride(3) == 1 and all(index is None or index.is_contiguous() for index in indices)


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens to all it has stored, every sequence at its own length.

    What `attention(..., causal=True)` gives for each sequence alone. A result depends on its own sequence only: not
    on the batch it is in, its place there, or the number of threads. Cache positions from a row's length on are
    never read.

    Args:
        query: [B, H, T, D], the T newest tokens of each sequence, whose keys and values the cache already holds.
        key_cache: [R, KVH, S, D], the query's dtype or float8_e4m3fn, for a float32 query also bfloat16; or int8
            [R, KVH, S, D + 4] as `kv_append` writes it. KVH divides H as in `attention`.
        value_cache: like `key_cache`.
        lengths: int64 [B], tokens of each sequence including the T new ones: T <= lengths[b] <= S.
        rows: int64 [B], the cache row of each batch entry; 0, 1, 2, ... if None. A row may appear more than once.
        scale, window, softcap, alibi_slopes: as in `attention`.

    Returns:
        [B, H, T, D], the query's dtype.

    Raises:
        ValueError: a shape, dtype or option is not as described; a length or row is out of range (checked on
            CPU).
    """
    # Plain inference on a CPU asks for the same again and again: what was checked and chosen for these shapes holds.
    known = cpu.known if alibi_slopes is None and undisturbed() else None
    if known is not None:
        found = known(query, key_cache, value_cache, lengths, rows, scale, window, softcap, native.num_threads())
        if found is not None:
            return found
    _check(query, key_cache, value_cache, lengths, rows)
    check_options("attention_decode", query, window, softcap, alibi_slopes)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    args = query, key_cache, value_cache, lengths, rows, factor, window, softcap, alibi_slopes
    if known is not None and cpu.why_not(*args) is None and _as_they_are(query, lengths, rows):
        cpu.remember(query, key_cache, value_cache, lengths, rows, scale, window, softcap)
    # Others than plain tensors may have no memory, as those of FakeTensorMode, or tell torch alone what they hold.
    opaque = any(isinstance(t, Tensor) and type(t) is not Tensor and type(t) is not Parameter for t in args)
    run = _attention_decode if opaque or tracing() else ATTENTION_DECODE
    return run(*args)
