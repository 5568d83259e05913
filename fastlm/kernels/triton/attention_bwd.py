"""Attention backward. With P the weights, dS = P * (dO V^T - delta): dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.

P is computed anew from the log-sum-exp (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Each gradient is summed by
one program in one order, so results are the same bits every time: keys' and values' over all heads that read them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels.triton.attention_common import LENGTHS, LOG2E, biased, capped, kept, load_rows, sequence, split

__all__ = ["attention_delta", "attention_grad_key_value", "attention_grad_query"]


@triton.jit(do_not_specialize=LENGTHS)
def attention_delta(
    OUT, DO, DLSE, DELTA, STARTS_Q,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gt: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_eb: tl.int64, stride_eh: tl.int64,
    heads, queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DELTA [.., queries] = sum over the features of OUT * DO, less the gradient of the log-sum-exp, if any.

    Grid: [row blocks * B * H]. Strides l are DELTA's, e DLSE's.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    h = tl.program_id(0) // blocks % heads
    b = tl.program_id(0) // blocks // heads
    begin, queries = sequence(STARTS_Q, b, queries)
    if first >= queries:
        return
    OUT += b * stride_ob + h * stride_oh + begin * stride_ot
    DO += b * stride_gb + h * stride_gh + begin * stride_gt
    output = load_rows(OUT, stride_ot, first, queries, BLOCK_M, DV, BLOCK_DV, True).to(tl.float32)
    grad = load_rows(DO, stride_gt, first, queries, BLOCK_M, DV, BLOCK_DV, True).to(tl.float32)
    delta = tl.sum(output * grad, 1)
    i = first + tl.arange(0, BLOCK_M)
    if DLSE is not None:
        delta -= tl.load(DLSE + b * stride_eb + h * stride_eh + begin + i, mask=i < queries, other=0.0)
    tl.store(DELTA + b * stride_lb + h * stride_lh + begin + i, delta, mask=i < queries)


@triton.jit
def _weights(x, unit, lse):
    """P of scores x * unit in units of ln 2; a row that saw no key has weights 0."""
    peak = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
    return tl.exp2(tl.fma(x, unit, -peak))


@triton.jit
def _over_queries(
    dk, dv, k, v, Q, stride_qt, DO, stride_gt, LSE, DELTA, begin, end, b, h, j, first_key, queries, keys, shift,
    mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of BLOCK_N keys, further by the queries begin..end of one head. Scores lie transposed."""
    factor = (scale if softcap is None else softcap) * LOG2E
    for m in tl.range(begin, end, BLOCK_M):
        q = load_rows(Q, stride_qt, m, queries, BLOCK_M, D, BLOCK_D, EDGE)
        i = m + tl.arange(0, BLOCK_M)
        if EDGE:  # rows beyond the end get weights of 0, as blind ones do
            lse = tl.load(LSE + i, mask=i < queries, other=float("-inf"))
            delta = tl.load(DELTA + i, mask=i < queries, other=0.0)
        else:
            lse = tl.load(LSE + i)
            delta = tl.load(DELTA + i)
        t = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
        x, unit = biased(
            t, factor, i[None, :], j[:, None], queries, keys, shift, window, slope, mask, stride_mi, stride_mj,
            CAUSAL, EDGE,
        )  # fmt: skip
        p = _weights(x, unit, lse[None, :])
        do = load_rows(DO, stride_gt, m, queries, BLOCK_M, DV, BLOCK_DV, EDGE)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        used = p
        if seed is not None:
            keep = tl.trans(kept(seed, dropout_p, b, h, i, first_key, BLOCK_N))
            used = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0) * (1.0 / (1.0 - dropout_p))
        dv = tl.dot(used.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if softcap is not None:
            ds *= 1.0 - t * t
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_grad_key_value(
    Q, K, V, DO, LSE, DELTA, DK, DVALUE, MASK, SLOPES, SEED, STARTS_Q, STARTS_K,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gt: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_dkb: tl.int64, stride_dkh: tl.int64, stride_dkt: tl.int64,
    stride_dvb: tl.int64, stride_dvh: tl.int64, stride_dvt: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj: tl.int64,
    stride_sb, heads, queries, keys, window, scale, softcap, dropout_p,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DK and DVALUE, from the gradient DO of the output. Arguments as in attention_forward; strides g are DO's.

    Grid: [key blocks * B * H / GROUP]. LSE and DELTA share their strides l.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    kv_heads = heads // GROUP
    first = tl.program_id(0) % blocks * BLOCK_N  # causal: the first keys, which most queries see, begin first
    kv_head = tl.program_id(0) // blocks % kv_heads
    b = tl.program_id(0) // blocks // kv_heads
    q_begin, queries = sequence(STARTS_Q, b, queries)
    k_begin, keys = sequence(STARTS_K, b, keys)
    if first >= keys:
        return
    shift = 0 if TOP_LEFT else keys - queries
    K += b * stride_kb + kv_head * stride_kh + k_begin * stride_kt
    V += b * stride_vb + kv_head * stride_vh + k_begin * stride_vt
    k = load_rows(K, stride_kt, first, keys, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(V, stride_vt, first, keys, BLOCK_N, DV, BLOCK_DV, True)
    j = first + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    seed = None
    if SEED is not None:
        seed = tl.load(SEED)

    last = tl.minimum(first + BLOCK_N, keys) - 1
    lo, full_lo, full_hi, hi = 0, 0, queries, queries
    if CAUSAL:
        lo, full_lo = first - shift, last - shift
    if window is not None:
        full_hi, hi = first + window - shift, last + window - shift
    lo, full_lo, full_hi, hi = split(lo, full_lo, full_hi, hi, queries, BLOCK_M)
    for g in tl.range(0, GROUP):
        h = kv_head * GROUP + g
        q_head = Q + b * stride_qb + h * stride_qh + q_begin * stride_qt
        do_head = DO + b * stride_gb + h * stride_gh + q_begin * stride_gt
        rows = b * stride_lb + h * stride_lh + q_begin
        slope = None
        if SLOPES is not None:
            slope = tl.load(SLOPES + b * stride_sb + h)
        mask = None
        if MASK is not None:
            mask = MASK + b * stride_mb + h * stride_mh
        if CAUSAL:
            dk, dv = _over_queries(
                dk, dv, k, v, q_head, stride_qt, do_head, stride_gt, LSE + rows, DELTA + rows, lo, full_lo,
                b, h, j, first, queries, keys, shift,
                mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
                CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, True,
            )  # fmt: skip
        dk, dv = _over_queries(
            dk, dv, k, v, q_head, stride_qt, do_head, stride_gt, LSE + rows, DELTA + rows, full_lo, full_hi,
            b, h, j, first, queries, keys, shift,
            mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
            CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        dk, dv = _over_queries(
            dk, dv, k, v, q_head, stride_qt, do_head, stride_gt, LSE + rows, DELTA + rows, full_hi, hi,
            b, h, j, first, queries, keys, shift,
            mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
            CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, True,
        )  # fmt: skip

    if SEED is not None:
        dv *= 1.0 / (1.0 - dropout_p)
    inside = (j < keys)[:, None]
    rows = (k_begin + j)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = DK + b * stride_dkb + kv_head * stride_dkh + (rows * stride_dkt + column)
    tl.store(pointers, (dk * scale).to(DK.dtype.element_ty), mask=inside & (column < D))
    column = tl.arange(0, BLOCK_DV)[None, :]
    pointers = DVALUE + b * stride_dvb + kv_head * stride_dvh + (rows * stride_dvt + column)
    tl.store(pointers, dv.to(DVALUE.dtype.element_ty), mask=inside & (column < DV))


@triton.jit
def _over_keys(
    dq, q, do, lse, delta, K, stride_kt, V, stride_vt, begin, end, b, h, i, queries, keys, shift,
    mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ / scale of a block of queries, further by the keys begin..end."""
    factor = (scale if softcap is None else softcap) * LOG2E
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, stride_kt, n, keys, BLOCK_N, D, BLOCK_D, EDGE)
        v = load_rows(V, stride_vt, n, keys, BLOCK_N, DV, BLOCK_DV, EDGE)
        t = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        j = n + tl.arange(0, BLOCK_N)[None, :]
        x, unit = biased(
            t, factor, i[:, None], j, queries, keys, shift, window, slope, mask, stride_mi, stride_mj, CAUSAL, EDGE
        )
        p = _weights(x, unit, lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            keep = kept(seed, dropout_p, b, h, i, n, BLOCK_N)
            dp = tl.where(keep, dp, 0.0) * (1.0 / (1.0 - dropout_p))
        ds = p * (dp - delta[:, None])
        if softcap is not None:
            ds *= 1.0 - t * t
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def attention_grad_query(
    Q, K, V, DO, LSE, DELTA, DQ, MASK, SLOPES, SEED, STARTS_Q, STARTS_K,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gt: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqt: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj: tl.int64,
    stride_sb, heads, queries, keys, window, scale, softcap, dropout_p,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ, from the gradient DO of the output. Arguments as in attention_grad_key_value. Grid: [row blocks * B * H]."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    first = block * BLOCK_M
    h = tl.program_id(0) // blocks % heads
    b = tl.program_id(0) // blocks // heads
    q_begin, queries = sequence(STARTS_Q, b, queries)
    k_begin, keys = sequence(STARTS_K, b, keys)
    if first >= queries:
        return
    shift = 0 if TOP_LEFT else keys - queries
    Q += b * stride_qb + h * stride_qh + q_begin * stride_qt
    DO += b * stride_gb + h * stride_gh + q_begin * stride_gt
    K += b * stride_kb + (h // GROUP) * stride_kh + k_begin * stride_kt
    V += b * stride_vb + (h // GROUP) * stride_vh + k_begin * stride_vt
    q = load_rows(Q, stride_qt, first, queries, BLOCK_M, D, BLOCK_D, True)
    do = load_rows(DO, stride_gt, first, queries, BLOCK_M, DV, BLOCK_DV, True)
    i = first + tl.arange(0, BLOCK_M)
    rows = b * stride_lb + h * stride_lh + q_begin + i
    lse = tl.load(LSE + rows, mask=i < queries, other=float("-inf"))
    delta = tl.load(DELTA + rows, mask=i < queries, other=0.0)
    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + b * stride_sb + h)
    mask = None
    if MASK is not None:
        mask = MASK + b * stride_mb + h * stride_mh
    seed = None
    if SEED is not None:
        seed = tl.load(SEED)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    low = first + shift
    high = tl.minimum(first + BLOCK_M, queries) - 1 + shift
    lo, full_lo, full_hi, hi = 0, 0, keys, keys
    if window is not None:
        lo, full_lo = low - window + 1, high - window + 1
    if CAUSAL:
        full_hi, hi = low + 1, high + 1
    lo, full_lo, full_hi, hi = split(lo, full_lo, full_hi, hi, keys, BLOCK_N)
    if window is not None:
        dq = _over_keys(
            dq, q, do, lse, delta, K, stride_kt, V, stride_vt, lo, full_lo, b, h, i, queries, keys, shift,
            mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
            CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    dq = _over_keys(
        dq, q, do, lse, delta, K, stride_kt, V, stride_vt, full_lo, full_hi, b, h, i, queries, keys, shift,
        mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
        CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, do, lse, delta, K, stride_kt, V, stride_vt, full_hi, hi, b, h, i, queries, keys, shift,
        mask, stride_mi, stride_mj, slope, window, scale, softcap, seed, dropout_p,
        CAUSAL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = DQ + b * stride_dqb + h * stride_dqh + ((q_begin + i)[:, None] * stride_dqt + column)
    tl.store(pointers, (dq * scale).to(DQ.dtype.element_ty), mask=(i < queries)[:, None] & (column < D))
