"""The softmax in the middle of the fused head and loss: of each row of logits its loss, and its gradient in its place.

`fastlm.ops.cross_entropy` multiplies a chunk of tokens with the head, has this kernel turn the chunk's logits into
their gradient, and multiplies that with head and tokens: the two passes here replace some eight over the same memory,
and all else is matrix products. With p the softmax and y the target smoothed by s,

    loss = log(sum exp x) - sum y x,   d loss / d x = p - y

Rows are padded to a multiple of 64 (`padded`), and loads and stores reach into the padding: with a mask at an odd
vocabulary like 50,257 they could not be wide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["shipped", "softmax_loss"]

BLOCK = 4096


@triton.jit
def _rows(
    logits,
    bias,
    targets,
    factors,
    losses,
    vocabulary,
    padded,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    kept = target != ignore_index
    target = tl.where(kept, target, 0)
    at = logits + row * padded
    column = tl.arange(0, BLOCK)

    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)  # the sum of the logits themselves, for smoothing
    for start in tl.range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        x = tl.load(at + start + column, mask=start + column < padded, other=0.0).to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        if BIAS:
            x += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            plain += tl.where(inside, x, 0.0)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher

    expected = tl.load(at + target).to(tl.float32)
    if BIAS:
        expected += tl.load(bias + target).to(tl.float32)
    expected -= top
    if SMOOTH:
        expected += smoothing * (tl.sum(plain, 0) / vocabulary - top - expected)
    tl.store(losses + row, tl.where(kept, tl.log(total) - expected, 0.0))

    if GRADIENT:
        factor = tl.load(factors + row)
        each = factor / total
        for start in tl.range(0, vocabulary, BLOCK):
            inside = start + column < vocabulary
            x = tl.load(at + start + column, mask=start + column < padded, other=0.0).to(tl.float32)
            x = tl.where(inside, x, float("-inf"))
            if BIAS:
                x += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
            slope = tl.exp(x - top) * each
            if SMOOTH:
                slope -= factor * smoothing / vocabulary
            slope -= tl.where(start + column == target, factor * (1.0 - smoothing), 0.0)
            slope = tl.where(factor == 0.0, 0.0, slope)  # what does not count leaves nothing, NaN neither
            tl.store(at + start + column, slope.to(logits.dtype.element_ty), mask=start + column < padded)


def softmax_loss(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    factors: Tensor | None,
) -> Tensor:
    """Losses, float32 [C], of logits [C, V] + bias [V]; 0 where the target [C] is to be ignored.

    Rows of `logits` are stride(0) apart, and what lies between them behind the V columns may be overwritten.
    With factors [C], float32, `logits` becomes the gradient of sum(factors * losses) with respect to itself.
    """
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if not rows:
        return losses
    _rows[(rows,)](
        logits,
        None if bias is None else bias.contiguous(),
        target.contiguous(),
        factors,
        losses,
        vocabulary,
        logits.stride(0),
        ignore_index,
        float(smoothing),
        BLOCK=BLOCK,
        BIAS=bias is not None,
        SMOOTH=smoothing != 0,
        GRADIENT=factors is not None,
        num_warps=16,
    )
    return losses


def shipped() -> Iterator[Shipped]:
    """Training, with and without bias and smoothing, and evaluation."""
    for dtype, full, gradient in (
        ("bf16", False, True),
        ("bf16", True, True),
        ("fp32", True, True),
        ("bf16", False, False),
    ):
        pointers = {"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32"}
        pointers |= ({"bias": f"*{dtype}"} if full else {}) | ({"factors": "*fp32"} if gradient else {})
        yield Shipped(
            name=f"cross_entropy {dtype}{' bias smoothing' if full else ''}{'' if gradient else ' loss alone'}",
            kernel=_rows,
            signature={**pointers, "vocabulary": "i32", "padded": "i32", "ignore_index": "i32", "smoothing": "fp32"},
            constants={
                **{name: None for name in ("bias", "factors") if name not in pointers},
                "BLOCK": BLOCK,
                "BIAS": full,
                "SMOOTH": full,
                "GRADIENT": gradient,
            },
            num_warps=16,
            num_stages=3,
            divisible_by_16=(*pointers, "padded"),
            work=Work(exponentials=BLOCK, bytes=BLOCK * {"bf16": 2, "fp32": 4}[dtype]),
        )
