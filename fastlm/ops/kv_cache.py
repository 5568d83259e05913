"""Appending to a key-value cache at positions that lie in memory, so that a recorded step can be replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import elementwise as kernel
from fastlm.ops.checks import describe
from fastlm.ops.library import needs_grad, opaque_kernel_why_not, tracing, triton_kernel, triton_why_not
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import kv_cache as reference
from fastlm.reference.kv_cache import KV_SCALE_BYTES, kv_dtypes

__all__ = ["int8_why_not", "kv_append", "offset"]


def _append_why_not(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None
) -> str | None:
    if needs_grad(key, value):
        return "a gradient is wanted"
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the last dimension of a cache is not contiguous"
    if (
        keys.dtype in (torch.bfloat16, torch.int8) and keys.is_cpu and values.is_cpu
    ):  # then the new ones alone have to be float32
        return opaque_kernel_why_not(native.CPU, key, value)
    return opaque_kernel_why_not(native.CPU, keys, values, key, value)


def int8_why_not(*caches: Tensor) -> str | None:
    """Why a Triton kernel can't take int8 caches: it reads the float32 behind each vector as such."""
    for cache in caches:
        numbers = (cache.shape[3], cache.storage_offset(), *cache.stride()[:3])
        if cache.dtype is torch.int8 and any(number % KV_SCALE_BYTES for number in numbers):
            return "vectors of an int8 cache do not all begin at multiples of 4 bytes"
    return None


def _triton_why_not(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None
) -> str | None:
    if needs_grad(key, value):
        return "a gradient is wanted"
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the last dimension of a cache is not contiguous"
    if torch.float64 in (keys.dtype, key.dtype):
        return "the kernel takes float32, float16 and bfloat16"
    return int8_why_not(keys, values) or triton_why_not(keys, values, key, value, starts, rows)


def _offset_why_not(
    source: Tensor, amount: int, target: Tensor, source_index: Tensor | None, target_index: Tensor | None
) -> str | None:
    for tensor in (source, target, source_index, target_index):
        if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
            return "a tensor is not contiguous on the CPU"
    return native.CPU.error


KV_APPEND = Op(
    "kv_append",
    [
        Implementation("cpu", kernel.kv_append, _append_why_not),
        Implementation("triton", triton_kernel("kv_append", "kv_append"), _triton_why_not),
        Implementation("reference", reference.kv_append, always),
    ],
)
OFFSET = Op(
    "offset",
    [
        Implementation("cpu", kernel.offset, _offset_why_not),
        Implementation("reference", reference.offset, always),
    ],
)


@torch.library.custom_op("fastlm::kv_append", mutates_args=("key_cache", "value_cache"))
def _kv_append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None
) -> None:
    KV_APPEND(key_cache, value_cache, key, value, starts, rows)


@_kv_append.register_fake
def _(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None) -> None:
    return None


@torch.library.custom_op("fastlm::offset", mutates_args=("out",))
def _offset(source: Tensor, amount: int, out: Tensor, source_index: Tensor | None, out_index: Tensor | None) -> None:
    # torch wants no argument that may be the one that is written.
    OFFSET(source.clone(), amount, out, source_index, out_index)


@_offset.register_fake
def _(source: Tensor, amount: int, out: Tensor, source_index: Tensor | None, out_index: Tensor | None) -> None:
    return None


def _holds(keys: Tensor, values: Tensor, new: Tensor) -> bool:
    return keys.dtype == values.dtype and keys.dtype in kv_dtypes(new.dtype)


def kv_append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, rows: Tensor | None = None
) -> None:
    """Writes the newest keys and values of each sequence to its row of a cache, in place.

    Args:
        key_cache: [R, KVH, S, D]; value_cache alike.
            Of dtype int8 it is [R, KVH, S, D + 4]: D integers, then the four bytes of their float32 scale, which is the
            vector's largest magnitude / 127.
        key: [B, KVH, T, D] of the cache's dtype; or, rounded to nearest, float32 for a bfloat16 cache, and any floating
            dtype for one of int8 or of float8_e4m3fn, in which what exceeds 448 becomes 448. value alike.
        starts: int64 [B], contiguous: the position of each sequence's first new token, starts[b] + T <= S.
        rows: int64 [B], contiguous, all different: the cache row of each batch entry; 0, 1, 2, ... if None.

    Raises:
        ValueError: a shape or dtype does not fit, or a position or row is outside the cache.
    """
    shape, cache_shape = key.shape, key_cache.shape
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if (
            len(shape) != 4
            or new.shape != shape
            or cache.shape != cache_shape
            or not _holds(key_cache, value_cache, new)
        ):
            raise ValueError(
                f"kv_append: {name} is {describe(new)}, its cache {describe(cache)}; expected one dtype "
                "(or a smaller one of the cache), [B, KVH, T, D] and [R, KVH, S, D], the same for keys and values"
            )
    if (shape[1], reference.kv_width(shape[3], key_cache.dtype)) != (cache_shape[1], cache_shape[3]):
        raise ValueError(f"kv_append: key is {describe(key)}, which does not fit a cache of {list(cache_shape)}")
    for name, index in (("starts", starts), ("rows", rows)):
        if index is not None and (index.shape != shape[:1] or index.dtype != torch.int64 or not index.is_contiguous()):
            raise ValueError(f"kv_append: {name} is {describe(index)}, expected contiguous int64 [{shape[0]}]")
    if tracing():
        _kv_append(key_cache, value_cache, key, value, starts, rows)
    else:
        KV_APPEND(key_cache, value_cache, key, value, starts, rows)


def offset(
    source: Tensor,
    amount: int = 0,
    *,
    out: Tensor,
    source_index: Tensor | None = None,
    out_index: Tensor | None = None,
) -> None:
    """out[out_index] = source[source_index] + amount, in place: how token ids, positions and lengths move.

    Args:
        source: int64, one dimension; out alike. They may be the same tensor under the same index.
        amount: added to every element.
        source_index: int64 [n], which elements; all in order if None. out_index alike.

    Raises:
        ValueError: a tensor is not int64 of one dimension, or the numbers of elements differ.
    """
    for name, tensor in (("source", source), ("out", out), ("source_index", source_index), ("out_index", out_index)):
        if tensor is not None and (tensor.dim() != 1 or tensor.dtype != torch.int64):
            raise ValueError(f"offset: {name} is {describe(tensor)}, expected int64 of one dimension")
    count, room = (len(t if index is None else index) for t, index in ((source, source_index), (out, out_index)))
    if count != room:
        raise ValueError(f"offset: {count} elements for {room} places")
    if tracing():
        _offset(source, amount, out, source_index, out_index)
    else:
        OFFSET(source, amount, out, source_index, out_index)
