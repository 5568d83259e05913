"""Attention of a few new tokens per sequence to a key-value cache, contiguous or paged: split keys, then combine.

Flash-decoding (Dao et al., 2023, https://pytorch.org/blog/flash-decoding): with few queries there are too few pairs of
sequence and head to fill a GPU, so each sequence's keys are cut into chunks that programs take separately. A program
leaves its chunk's largest score m, the sum l of exp2(score - m) and the values weighted by it; a second kernel merges
them: with M = max m, output = sum(2^(m - M) acc) / sum(2^(m - M) l).

The queries that share a key/value head are rows of one tile, tokens x group: keys and values are read once for all.
Chunks lie at fixed positions: a sequence's bits depend neither on the batch nor on where its cache row or pages are.
How many chunks there may be follows from shapes; those that a sequence does not reach end at once. So nothing waits
for the lengths' values, and the launches fit a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.reference.kv_cache import KV_SCALE_BYTES

__all__ = ["CHUNK", "attention_decode", "attention_paged", "combine_chunks", "decode_chunk", "tile"]

CHUNK = 256
"""Keys of a chunk. Smaller ones fill the GPU sooner and leave more to combine: a chunk leaves 4 (D + 2) bytes a query
for the 2 * 256 D elements that it read."""
MOST_CHUNKS = 64
"""Longer caches have larger chunks, for the combining program holds them all."""
FEW_TOKENS = 16
"""With more new tokens than this, blocks of queries fill the GPU: their keys are not split."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _float8(codes):
    """e4m3 (fn: no infinities, 0x7f is NaN) to float32, for chips without an instruction for it."""
    bits = codes.to(tl.int32)
    magnitude = bits & 0x7F
    # As float32 the same exponent counts from another bias; the product is exact, for subnormals too.
    value = ((bits & 0x80) << 24 | magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^(127 - 7)
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def decode_chunk(
    query,
    keys,
    values,
    output,
    largest,
    total,
    lengths,
    index,  # the cache row of each batch entry, [B], or its pages, [B, M]; unused where CACHE is "own"
    slopes,
    key_scale,  # of each head; of int8 caches each key's own, which lie behind it: see `_launch`
    value_scale,
    factor,  # scale, times log2(e) where there is no softcap
    softcap,
    window,
    tokens,
    capacity,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kr,  # of caches in bytes of int8, strides count 4 of them
    stride_kh,
    stride_ks,
    stride_vr,
    stride_vh,
    stride_vs,
    stride_ib,
    stride_slopes,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,  # 0: one program takes all keys and writes the result itself
    CACHE: tl.constexpr,  # "own": row b; "rows": row index[b]; "pages"
    PAGE: tl.constexpr,  # positions to a page: a constant, for by a variable every place is a division
    CODES: tl.constexpr,  # "": none; float8 "native" or "bits", bytes widened by hand; "int8"
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    blocks = tl.cdiv(tokens * GROUP, BLOCK_M)
    block = tl.program_id(0) % blocks
    kv_head = (tl.program_id(0) // blocks) % KV_HEADS
    batch = (tl.program_id(0) // blocks // KV_HEADS).to(tl.int64)
    length = tl.minimum(tl.load(lengths + batch), capacity).to(tl.int32)  # beyond the capacity is others' memory

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # of the tile: token x group
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    used = row < tokens * GROUP
    place = length - tokens + token  # a query's own position
    # The keys that any of these rows sees.
    first = 0
    if WINDOW:
        first = tl.maximum(length - tokens + block * BLOCK_M // GROUP - window + 1, 0)
    end = tl.minimum(length, length - tokens + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    low = first
    if CHUNK:
        low = tl.maximum(first, tl.program_id(1) * CHUNK)
        end = tl.minimum(end, tl.program_id(1) * CHUNK + CHUNK)
        if low >= end:
            return

    feature = tl.arange(0, PADDED)
    # Padding in every comparison would keep loads from being wide: it is only where there is any.
    inside = feature < DIM
    q_at = query + batch * stride_qb + head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qt
    q = tl.load(q_at[:, None] + feature[None, :], mask=used[:, None] & inside[None, :], other=0.0)
    if ALIBI:
        slope = tl.load(slopes + batch * stride_slopes + head, mask=used, other=0.0) * LOG2E
    UNIT: tl.constexpr = 4 if CODES == "int8" else 1
    if CODES == "native" or CODES == "bits":
        factor = factor * tl.load(key_scale + kv_head)
    cache_row = batch
    if CACHE == "rows":
        cache_row = tl.load(index + batch * stride_ib)
    k_head = kv_head.to(tl.int64) * stride_kh
    v_head = kv_head.to(tl.int64) * stride_vh

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in tl.range(low // BLOCK_N * BLOCK_N, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        stored = (position >= low) & (position < end)
        if CACHE == "pages":
            pages = tl.load(index + batch * stride_ib + position // PAGE, mask=stored, other=0).to(tl.int64)
            at = (position % PAGE).to(tl.int64)
            k_at = k_head + pages * stride_kr + at * stride_ks
            v_at = v_head + pages * stride_vr + at * stride_vs
        else:
            k_at = k_head + cache_row * stride_kr + position.to(tl.int64) * stride_ks
            v_at = v_head + cache_row * stride_vr + position.to(tl.int64) * stride_vs
        k = tl.load(keys + (k_at[None, :] * UNIT + feature[:, None]), mask=stored[None, :] & inside[:, None], other=0.0)
        if CODES == "bits":
            k = _float8(k)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * factor
        if CODES == "int8":  # integers are exact in any dtype: their scale may follow
            scores *= tl.load(key_scale + k_at, mask=stored, other=0.0)[None, :]
        if SOFTCAP:
            scores = softcap * LOG2E * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))  # tanh
        if ALIBI:
            scores += slope[:, None] * (position[None, :] - place[:, None]).to(tl.float32)
        visible = stored[None, :] & (position[None, :] <= place[:, None])
        if WINDOW:
            visible &= position[None, :] > place[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))

        new_m = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(m - base)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741
        v = tl.load(
            values + (v_at[:, None] * UNIT + feature[None, :]), mask=stored[:, None] & inside[None, :], other=0.0
        )
        if CODES == "bits":
            v = _float8(v)
        if CODES == "int8":
            v_scale = tl.load(value_scale + v_at, mask=stored, other=0.0)
            if q.dtype == tl.float16:  # in which a weight times a scale would lose bits to the exponent's end
                v = v.to(tl.float32) * v_scale[:, None]
            else:
                p *= v_scale[None, :]
        acc = acc * rescale[:, None]
        acc += tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        m = new_m

    if CODES == "native" or CODES == "bits":
        acc = acc * tl.load(value_scale + kv_head)
    out_row = (batch * tokens + token) * (KV_HEADS * GROUP) + head  # output [B, T, H, (chunk,) D]
    if CHUNK:
        out_row = out_row * tl.num_programs(1) + tl.program_id(1)
        tl.store(largest + out_row, m, mask=used)
        tl.store(total + out_row, l, mask=used)
    else:
        acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    where = output + out_row[:, None] * DIM + feature[None, :]
    tl.store(where, acc.to(output.dtype.element_ty), mask=used[:, None] & inside[None, :])


@triton.jit
def combine_chunks(
    partial,
    largest,
    total,
    output,
    lengths,
    window,
    tokens,
    capacity,
    chunks,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = (out_row // HEADS) % tokens
    length = tl.minimum(tl.load(lengths + out_row // HEADS // tokens), capacity)
    place = length - tokens + token
    chunk = tl.arange(0, CHUNKS)
    written = chunk * CHUNK <= place  # the others hold whatever was in memory
    if WINDOW:
        written &= chunk * CHUNK + CHUNK > place - window + 1
    at = out_row * chunks + chunk
    m = tl.load(largest + at, mask=written, other=float("-inf"))
    l = tl.load(total + at, mask=written, other=0.0)  # noqa: E741
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    acc = tl.load(
        partial + at[:, None] * DIM + feature[None, :], mask=written[:, None] & (feature < DIM)[None, :], other=0.0
    )
    bottom = tl.sum(weight * l, 0)
    result = tl.sum(weight[:, None] * acc, 0) / tl.where(bottom == 0.0, 1.0, bottom)
    tl.store(output + out_row * DIM + feature, result.to(output.dtype.element_ty), mask=feature < DIM)


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
    kind = "own" if rows is None else "rows"
    return _launch(
        kind, query, key_cache, value_cache, lengths, rows, scale, window, softcap, alibi_slopes, key_cache.shape[2]
    )


def attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention of query [B, H, T, D] to pages [P, KVH, page, D]; see `fastlm.ops.attention_paged`."""
    one = block_table.shape[1] == 1  # each sequence has one page of its own: a contiguous cache
    return _launch(
        "rows" if one else "pages",
        query,
        key_pages,
        value_pages,
        lengths,
        block_table,
        scale,
        window,
        softcap,
        alibi_slopes,
        block_table.shape[1] * key_pages.shape[2],
        key_scale,
        value_scale,
    )


def chunk_size(tokens: int, capacity: int) -> int:
    """Keys to a chunk for so many new tokens and such a cache; 0 where one program takes all keys."""
    if tokens > FEW_TOKENS or capacity <= CHUNK:
        return 0
    return max(CHUNK, triton.next_power_of_2(triton.cdiv(capacity, MOST_CHUNKS)))


def tile(rows: int, dim: int, element_size: int, codes: str = "") -> dict[str, int]:
    """The tile for so many queries (tokens x group) of a key/value head: sizes, warps and stages.

    int8 is read 4 bytes at a time and widened in registers, which hold fewer keys of it than of the query's dtype.
    """
    padded = max(16, triton.next_power_of_2(dim))
    width = padded * element_size  # bytes of a key
    return {
        "PADDED": padded,
        "BLOCK_M": min(max(16, triton.next_power_of_2(rows)), max(16, 8192 // width)),
        "BLOCK_N": 16 if codes == "int8" else min(64, max(16, 16384 // width)),
        "num_warps": 8 if width == 512 else 4,
        "num_stages": 2,
    }


def native_float8(device: torch.device) -> bool:
    """Whether Triton converts e4m3 on this device; before sm_89 and on gfx942 (whose own e4m3 differs) it does not."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9))


def _launch(
    kind: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    capacity: int,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    batch, heads, tokens, dim = query.shape
    kv_heads = keys.shape[1]
    output = query.new_empty((batch, tokens, heads, dim))
    if output.numel() == 0:
        return output.transpose(1, 2)
    query, keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (query, keys, values))
    lengths = lengths.contiguous()
    index = None if index is None else index.contiguous()
    codes, unit = "", 1
    if keys.dtype == torch.int8:
        # [.., D + 4]: a key's scale is the float behind it. Strides count floats, so that it is known that 4 bytes of a
        # key can be read at once.
        codes, unit = "int8", KV_SCALE_BYTES
        key_scale, value_scale = (t.view(torch.float32)[..., dim // unit :] for t in (keys, values))
    if keys.dtype == torch.float8_e4m3fn:
        codes = "native" if native_float8(query.device) else "bits"
        if codes == "bits":
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        one = query.new_ones(1, dtype=torch.float32)
        scales = (one if s is None else s.float() for s in (key_scale, value_scale))
        key_scale, value_scale = (s.expand(kv_heads).contiguous() for s in scales)
    if slopes is not None:
        slopes = slopes.float().contiguous()
    group = heads // kv_heads
    sizes = tile(tokens * group, dim, query.element_size(), codes)
    chunk = chunk_size(tokens, capacity)
    chunks = triton.cdiv(capacity, chunk) if chunk else 1
    partial, largest, total = output, None, None
    if chunk:
        largest, total = query.new_empty((2, batch, tokens, heads, chunks), dtype=torch.float32)
        partial = query.new_empty((batch, tokens, heads, chunks, dim), dtype=torch.float32)
    blocks = triton.cdiv(tokens * group, sizes["BLOCK_M"])
    decode_chunk[(batch * kv_heads * blocks, chunks)](
        query,
        keys,
        values,
        partial,
        largest,
        total,
        lengths,
        index,
        slopes,
        key_scale,
        value_scale,
        float(scale if softcap else scale * LOG2E.value),
        float(softcap or 0.0),
        window or 0,
        tokens,
        capacity,
        *query.stride()[:3],
        *(stride // unit for t in (keys, values) for stride in t.stride()[:3]),
        index.stride(0) if index is not None else 0,
        heads if slopes is not None and slopes.dim() == 2 else 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        CHUNK=chunk,
        CACHE=kind,
        PAGE=keys.shape[2] if kind == "pages" else 0,
        CODES=codes,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        ALIBI=slopes is not None,
        **sizes,
    )
    if chunk:
        block_d = min(sizes["PADDED"], 64)
        combine_chunks[(batch * tokens * heads, triton.cdiv(dim, block_d))](
            partial,
            largest,
            total,
            output,
            lengths,
            window or 0,
            tokens,
            capacity,
            chunks,
            HEADS=heads,
            DIM=dim,
            BLOCK_D=block_d,
            CHUNK=chunk,
            CHUNKS=triton.next_power_of_2(chunks),
            WINDOW=window is not None,
            num_warps=4,
        )
    return output.transpose(1, 2)
