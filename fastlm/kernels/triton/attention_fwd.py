"""Attention, forward: one program computes BLOCK_M rows of one head, passing over the keys they see once.

Online softmax as in Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels.triton.attention_common import LENGTHS, LOG2E, biased, capped, kept, load_rows, sequence, split

__all__ = ["attention_forward"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_keys(
    state, q, K, stride_kt, V, stride_vt, begin, end, b, h, i, queries, keys, shift,
    mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(output, total, peak) of each row, further by the keys begin..end: all relative to 2^peak."""
    output, total, peak = state
    factor = (scale if softcap is None else softcap) * LOG2E
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, stride_kt, n, keys, BLOCK_N, D, BLOCK_D, EDGE)
        x = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        j = n + tl.arange(0, BLOCK_N)[None, :]
        x, unit = biased(
            x, factor, i[:, None], j, queries, keys, shift, window, slope, mask, stride_mi, stride_mj, CAUSAL, EDGE
        )
        top = tl.maximum(peak, tl.max(x, 1) * unit)
        zero = top
        if EDGE or mask is not None:  # a row that has seen nothing yet: -inf - -inf would be NaN
            zero = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(tl.fma(x, unit, -zero[:, None]))
        shrink = tl.exp2(peak - zero)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(kept(seed, dropout_p, b, h, i, n, BLOCK_N), p, 0.0)
        v = load_rows(V, stride_vt, n, keys, BLOCK_N, DV, BLOCK_DV, EDGE)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
        peak = top
    return output, total, peak


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    Q, K, V, OUT, LSE, SINKS, MASK, SLOPES, SEED, STARTS_Q, STARTS_K,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj: tl.int64,
    stride_sb, heads, queries, keys, window, scale, softcap, dropout_p,
    GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT and the log-sum-exp LSE [.., queries] of Q, K, V, whose last stride is 1.

    Grid: [row blocks * B * H], or with PACK, where the GROUP heads that read one key head are interleaved into the
    rows (row r: query r // GROUP of the group's head r % GROUP), [row blocks * B * H / GROUP]. `queries` and `keys` are
    the lengths, or the largest ones if STARTS_Q and STARTS_K [B + 1] say where packed sequences begin.
    """
    together: tl.constexpr = GROUP if PACK else 1
    blocks = tl.cdiv(queries * together, BLOCK_M)
    heads_here = heads // together
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    if CAUSAL:  # the longest work first: what is short fills the gaps at the end
        block = blocks - 1 - block
    h = bh % heads_here * together
    b = bh // heads_here
    q_begin, queries = sequence(STARTS_Q, b, queries)
    k_begin, keys = sequence(STARTS_K, b, keys)
    first = block * BLOCK_M
    if first >= queries * together:  # of a packed sequence shorter than the longest
        return
    r = first + tl.arange(0, BLOCK_M)
    i = r // together
    hs = h + r % together  # the head of each row
    shift = 0 if TOP_LEFT else keys - queries

    column = tl.arange(0, BLOCK_D)[None, :]
    Q += b * stride_qb + q_begin * stride_qt
    q_inside = (i < queries)[:, None] & (column < D)
    q = tl.load(Q + (hs[:, None] * stride_qh + i[:, None] * stride_qt + column), mask=q_inside, other=0.0)
    K += b * stride_kb + (h // GROUP) * stride_kh + k_begin * stride_kt
    V += b * stride_vb + (h // GROUP) * stride_vh + k_begin * stride_vt

    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + b * stride_sb + hs)[:, None]
    mask = None
    if MASK is not None:
        mask = MASK + b * stride_mb + hs[:, None] * stride_mh
    seed = None
    if SEED is not None:
        seed = tl.load(SEED)

    # A sink is one more score, of a key whose value is 0.
    if SINKS is None:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    else:
        peak = tl.load(SINKS + hs).to(tl.float32) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    state = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), total, peak

    low = first // together + shift  # the key positions of the first and the last query
    high = tl.minimum((first + BLOCK_M - 1) // together, queries - 1) + shift
    lo, full_lo, full_hi, hi = 0, 0, keys, keys
    if window is not None:
        lo, full_lo = low - window + 1, high - window + 1
    if CAUSAL:
        full_hi, hi = low + 1, high + 1
    lo, full_lo, full_hi, hi = split(lo, full_lo, full_hi, hi, keys, BLOCK_N)
    if window is not None:
        state = _over_keys(
            state, q, K, stride_kt, V, stride_vt, lo, full_lo, b, hs[:, None], i, queries, keys, shift,
            mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
            CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    state = _over_keys(
        state, q, K, stride_kt, V, stride_vt, full_lo, full_hi, b, hs[:, None], i, queries, keys, shift,
        mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
        CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    output, total, peak = _over_keys(
        state, q, K, stride_kt, V, stride_vt, full_hi, hi, b, hs[:, None], i, queries, keys, shift,
        mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
        CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    blind = total == 0.0
    weight = 1.0 / tl.where(blind, 1.0, total)
    if SEED is not None:
        weight = weight / (1.0 - dropout_p)
    output = output * weight[:, None]
    lse = tl.where(blind, float("-inf"), peak * LN2 + tl.log(tl.where(blind, 1.0, total)))
    column = tl.arange(0, BLOCK_DV)[None, :]
    OUT += b * stride_ob + q_begin * stride_ot
    pointers = OUT + (hs[:, None] * stride_oh + i[:, None] * stride_ot + column)
    tl.store(pointers, output.to(OUT.dtype.element_ty), mask=(i < queries)[:, None] & (column < DV))
    tl.store(LSE + b * stride_lb + q_begin + hs * stride_lh + i, lse, mask=i < queries)
