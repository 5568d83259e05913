"""The newest keys and values into a key-value cache: rounding, their scales and the writing in one launch.

In an int8 cache the bytes are those of the reference: IEEE divisions, and no multiplication fused with an addition.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.attention_decode import native_float8
from fastlm.kernels.triton.shipped import TARGETS, Shipped, Work
from fastlm.reference import kv_cache as reference
from fastlm.reference.kv_cache import KV_SCALE_BYTES

__all__ = ["kv_append", "shipped"]


@triton.jit
def _write(new, cache, scales, source, target, mask, DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Vectors of DIM features from new + source to cache + target * UNIT, both [heads]; [heads] `mask`."""
    feature = tl.arange(0, PADDED)
    inside = mask[:, None] & (feature < DIM)[None, :]
    x = tl.load(new + (source[:, None] + feature[None, :]), mask=inside, other=0.0)
    if scales is not None:
        x = x.to(tl.float32)
        wild = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1) > 0  # NaN, too: a maximum alone may ignore it
        largest = tl.max(tl.abs(x), 1)
        tiny = largest < 1e-30
        most = tl.full(largest.shape, 127.0, tl.float32)
        scale = tl.where(wild, float("nan"), tl.where(tiny, 0.0, tl.div_rn(largest, most)))
        inverse = tl.where(wild | tiny, 0.0, tl.div_rn(most, largest))
        # Added to 1.5 * 2^23 a number is rounded to an integer, half to even, that its last bits have.
        x = (x * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        x = tl.where(wild[:, None], 0, x)
        tl.store(scales + target, scale, mask=mask)
    tl.store(cache + (target[:, None] * UNIT + feature[None, :]), x.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _append(
    key,
    value,
    key_cache,
    value_cache,
    key_scales,  # of an int8 cache, its floats; strides of the cache then count 4 bytes
    value_scales,
    starts,
    rows,
    heads,
    tokens,
    cache_rows,
    capacity,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_kcr,
    stride_kch,
    stride_kcs,
    stride_vcr,
    stride_vch,
    stride_vcs,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNIT: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    place = tl.load(starts + batch) + token
    row = batch
    if rows is not None:
        row = tl.load(rows + batch)
    # Outside of the cache is others' memory.
    fits = (place >= 0) & (place < capacity) & (row >= 0) & (row < cache_rows)
    mask = head < tl.where(fits, heads, 0)
    source = batch * stride_kb + head * stride_kh + token * stride_kt
    target = row * stride_kcr + head * stride_kch + place * stride_kcs
    _write(key, key_cache, key_scales, source, target, mask, DIM, PADDED, UNIT)
    source = batch * stride_vb + head * stride_vh + token * stride_vt
    target = row * stride_vcr + head * stride_vch + place * stride_vcs
    _write(value, value_cache, value_scales, source, target, mask, DIM, PADDED, UNIT)


def kv_append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None
) -> None:
    """As `fastlm.reference.kv_cache.kv_append`, but what has no place in the cache is not written."""
    batch, heads, tokens, dim = key.shape
    if key_cache.dtype is torch.float8_e4m3fn and not native_float8(key.device):
        return reference.kv_append(key_cache, value_cache, key, value, starts, rows)
    if not key.numel():
        return None
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (key, value))
    unit = KV_SCALE_BYTES if key_cache.dtype is torch.int8 else 1
    scales = (t.view(torch.float32)[..., dim // unit :] if unit > 1 else None for t in (key_cache, value_cache))
    block = _heads(heads, dim)
    _append[(batch * tokens, triton.cdiv(heads, block))](
        key,
        value,
        key_cache,
        value_cache,
        *scales,
        starts,
        rows,
        heads,
        tokens,
        len(key_cache),
        key_cache.shape[2],
        *key.stride()[:3],
        *value.stride()[:3],
        *(stride // unit for t in (key_cache, value_cache) for stride in t.stride()[:3]),
        DIM=dim,
        PADDED=triton.next_power_of_2(dim),
        BLOCK_H=block,
        UNIT=unit,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return None


def _heads(heads: int, dim: int) -> int:
    """Heads to a program: some 1,024 features."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // triton.next_power_of_2(dim)))


def shipped() -> Iterator[Shipped]:
    """8 heads in bfloat16 to each kind of cache, one token."""
    dim, block = 128, _heads(8, 128)
    for cache, pointer, targets in (
        ("bf16", "*bf16", TARGETS),
        ("int8", "*i8", TARGETS),
        ("float8", "*fp8e4nv", ("sm_90", "sm_100")),
    ):
        pointers = {
            **dict.fromkeys(("key", "value"), "*bf16"),
            **dict.fromkeys(("key_cache", "value_cache"), pointer),
            **(dict.fromkeys(("key_scales", "value_scales"), "*fp32") if cache == "int8" else {}),
            **dict.fromkeys(("starts", "rows"), "*i64"),
        }
        numbers = [name for name in _append.arg_names if name.islower() and name not in (*pointers, *_SCALES, "tokens")]
        yield Shipped(
            name=f"kv_append bf16 d{dim} to {cache}",
            kernel=_append,
            signature={**pointers, **dict.fromkeys(numbers, "i32")},
            constants={
                "tokens": 1,
                **{name: None for name in _SCALES if name not in pointers},
                "DIM": dim,
                "PADDED": dim,
                "BLOCK_H": block,
                "UNIT": KV_SCALE_BYTES if cache == "int8" else 1,
            },
            num_warps=4,
            num_stages=3,
            targets=targets,
            divisible_by_16=(
                *pointers,
                *(n for n in numbers if n.startswith("stride_") and len(n) == len("stride_kb")),
            ),
            work=Work(bytes=2 * block * dim * 2),
        )


_SCALES = ("key_scales", "value_scales")
