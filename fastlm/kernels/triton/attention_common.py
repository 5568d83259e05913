"""What the attention kernels share: where sequences lie, which blocks are looked at, how scores are made and hidden.

Scores are kept in units of ln 2, so that exp2, which GPUs have, is the exponential. Where nothing is added to them the
factor (scale * log2 e) stays apart and is folded into the exponential's argument: one fused multiply-add an element.
Kernels are given None for what a call has not, and Triton compiles no code for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LENGTHS", "LOG2E", "biased", "capped", "kept", "load_rows", "sequence", "split"]

LOG2E = tl.constexpr(1.4426950408889634)

LENGTHS = ("queries", "keys", "window")
"""Arguments that are numbers like any other: no other length compiles a kernel anew."""


@triton.jit
def sequence(starts, b, length):
    """Where sequence b begins and how long it is: starts [B + 1] if sequences are packed, else 0 and `length`."""
    if starts is None:
        begin = tl.cast(0, tl.int64)
    else:
        begin = tl.load(starts + b).to(tl.int64)
        length = (tl.load(starts + b + 1).to(tl.int64) - begin).to(tl.int32)
    return begin, length


@triton.jit
def split(lo, full_lo, full_hi, hi, end, BLOCK: tl.constexpr):
    """Blocks from lo to hi as three ranges, lo..full_lo, ..full_hi, ..hi: only the middle one needs no masking.

    All are clipped to 0..end. Some row sees [lo, hi), every row sees [full_lo, full_hi).
    """
    lo = tl.maximum(lo, 0) // BLOCK * BLOCK
    hi = tl.minimum(tl.maximum(hi, 0), end)
    full_lo = tl.minimum(tl.cdiv(tl.maximum(full_lo, 0), BLOCK), tl.cdiv(hi, BLOCK)) * BLOCK
    full_hi = tl.maximum(tl.minimum(tl.maximum(full_hi, 0), end) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def load_rows(
    base, stride, first, limit, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr
):
    """[ROWS, BLOCK_D]: rows first.. of a matrix with D columns; 0 beyond them, and with EDGE from row `limit` on."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    # One 64-bit address for the block, and offsets within it: a sequence may have more than 2^31 elements.
    pointers = base + first * stride + (row[:, None] * stride + column[None, :])
    if EDGE or D < BLOCK_D:
        inside = (column < D)[None, :]
        if EDGE:
            inside = inside & (first + row < limit)[:, None]
        found = tl.load(pointers, mask=inside, other=0.0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def capped(products, scale, softcap):
    """tanh(scale * products / softcap) where there is a softcap, to be multiplied by it; else the products."""
    if softcap is not None:
        products = 1.0 - 2.0 / (tl.exp2(products * (scale / softcap * 2.0 * LOG2E)) + 1.0)
    return products


@triton.jit
def biased(
    x,
    factor,
    i,
    j,
    queries,
    keys,
    shift,
    window,
    slope,
    mask,
    stride_mi,
    stride_mj,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(y, unit): scores y * unit in units of ln 2, from x * factor, with biases; -inf where query i does not see key j.

    i and j broadcast against each other and x. A query stands at key position i + shift. Without EDGE, causality, the
    window and the ends of the sequences hide nothing here.
    """
    unit = factor
    if slope is not None:
        x = x * factor + slope * LOG2E * (j - i - shift).to(tl.float32)
        unit = 1.0
    if mask is not None:
        pointers = mask + i * stride_mi + j * stride_mj
        given = tl.load(pointers, mask=(i < queries) & (j < keys), other=0)
        if mask.dtype.element_ty.is_floating():
            if slope is None:
                x = x * factor
            x += given.to(tl.float32) * LOG2E
            unit = 1.0
        else:
            x = tl.where(given != 0, x, float("-inf"))
    if EDGE:
        seen = (j < keys) & (i < queries)
        if CAUSAL:
            seen = seen & (j <= i + shift)
        if window is not None:
            seen = seen & (j > i + shift - window)
        x = tl.where(seen, x, float("-inf"))
    return x, unit


@triton.jit
def kept(seed, dropout_p, b, h, i, first_key, BLOCK_N: tl.constexpr):
    """Bool [rows, BLOCK_N]: the weights that survive dropout. i [rows], h a number or [rows, 1].

    Word j % 4 of Philox 4x32-10 with the seed as key and (j / 4, i, h, b) as counter, so that a draw depends on nothing
    but the seed and the weight's place.
    """
    four = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, four, i[:, None], h, b)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (i.shape[0], BLOCK_N))
    return tl.random.uint_to_uniform_float(words) >= dropout_p
