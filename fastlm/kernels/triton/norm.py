"""Layer and root-mean-square normalisation, forward and backward, a row to a program.

With x^ = (x - mean) rstd (mean = 0 for rms) and g = dy w:

    dx = rstd (g - mean(g) - x^ mean(g x^))     (no mean(g) for rms)
    dw = sum over rows of dy x^,  db = sum over rows of dy

The sums over rows are taken by a fixed number of programs, each over its rows in order, and then added in order:
the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["layer_norm", "rms_norm", "shipped"]

PARTS = 256
"""Programs of the backward pass, each of which leaves a row of partial sums for dw and db."""


@triton.jit
def _forward(
    input,
    weight,
    bias,
    output,
    means,
    rstds,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < DIM
    x = tl.load(input + row * DIM + feature, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 0) / DIM
        x = tl.where(inside, x - mean, 0.0)
        if KEEP:
            tl.store(means + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
    if KEEP:
        tl.store(rstds + row, rstd)
    y = x * rstd
    if WEIGHT:
        y = y * tl.load(weight + feature, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * DIM + feature, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad,
    input,
    weight,
    means,
    rstds,
    grad_input,
    grad_weight,
    grad_bias,
    rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUM_WEIGHT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
):
    part = tl.program_id(0)
    width = tl.full([], DIM, tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < DIM
    if WEIGHT:
        w = tl.load(weight + feature, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(part, rows, tl.num_programs(0)):
        at = row * width + feature
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row)
        if CENTRED:
            x = tl.where(inside, x - tl.load(means + row), 0.0)
        x = x * rstd
        if SUM_WEIGHT:
            sum_weight += dy * x
        if SUM_BIAS:
            sum_bias += dy
        if WEIGHT:
            dy = dy * w
        dx = dy - x * (tl.sum(dy * x, 0) / DIM)
        if CENTRED:
            dx = dx - tl.sum(dy, 0) / DIM
        tl.store(grad_input + at, (dx * rstd).to(grad_input.dtype.element_ty), mask=inside)
    if SUM_WEIGHT:
        tl.store(grad_weight + part * DIM + feature, sum_weight, mask=inside)
    if SUM_BIAS:
        tl.store(grad_bias + part * DIM + feature, sum_bias, mask=inside)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        x = input.contiguous()
        weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
        dim = x.shape[-1]
        rows = x.numel() // max(dim, 1)
        output = torch.empty_like(x)
        keep = any(ctx.needs_input_grad)
        means = x.new_empty(rows if keep and centred else 0, dtype=torch.float32)
        rstds = x.new_empty(rows if keep else 0, dtype=torch.float32)
        block = triton.next_power_of_2(max(dim, 1))
        if output.numel():
            _forward[(rows,)](
                x,
                weight,
                bias,
                output,
                means,
                rstds,
                float(eps),
                DIM=dim,
                BLOCK=block,
                CENTRED=centred,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                KEEP=keep,
                num_warps=_warps(block),
            )
        ctx.save_for_backward(x, weight, means, rstds)
        ctx.centred, ctx.bias_dtype = centred, None if bias is None else bias.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, means, rstds = ctx.saved_tensors
        dim, rows = x.shape[-1], rstds.shape[0]
        want_weight, want_bias = ctx.needs_input_grad[1:3]
        parts = min(rows, PARTS)
        grad_input = torch.empty_like(x)
        sums = x.new_empty((2, parts, dim), dtype=torch.float32)
        block = triton.next_power_of_2(max(dim, 1))
        if x.numel():
            _backward[(parts,)](
                grad.contiguous(),
                x,
                weight,
                means,
                rstds,
                grad_input,
                sums[0],
                sums[1],
                rows,
                DIM=dim,
                BLOCK=block,
                CENTRED=ctx.centred,
                WEIGHT=weight is not None,
                SUM_WEIGHT=want_weight,
                SUM_BIAS=want_bias,
                num_warps=_warps(block),
            )
        return (
            grad_input,
            sums[0].sum(0).to(weight.dtype) if want_weight else None,
            sums[1].sum(0).to(ctx.bias_dtype) if want_bias else None,
            None,
            None,
        )


def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., dim], weight [dim]; differentiable once."""
    result: Tensor = _Norm.apply(input, weight, None, eps, False)
    return result


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of [..., dim]; differentiable once."""
    result: Tensor = _Norm.apply(input, weight, bias, eps, True)
    return result


def shipped() -> Iterator[Shipped]:
    """Both norms, forward and backward, at usual widths."""
    for centred, dtype, dim in ((False, "bf16", 576), (False, "bf16", 4096), (True, "bf16", 768), (True, "fp32", 8192)):
        block = triton.next_power_of_2(dim)
        name = f"{'layer_norm' if centred else 'rms_norm'} {dtype} d{dim}"
        size = {"bf16": 2, "fp32": 4}[dtype]
        weights = {"weight": f"*{dtype}"} | ({"bias": f"*{dtype}"} if centred else {})
        shape = {"DIM": dim, "BLOCK": block, "CENTRED": centred, "WEIGHT": True}
        pointers = {"input": f"*{dtype}", **weights, "output": f"*{dtype}", "means": "*fp32", "rstds": "*fp32"}
        yield Shipped(
            name=f"{name} forward",
            kernel=_forward,
            signature={**pointers, "eps": "fp32"},
            constants={**shape, **({} if centred else {"bias": None}), "BIAS": centred, "KEEP": True},
            num_warps=_warps(block),
            num_stages=3,
            divisible_by_16=tuple(pointers),
            work=Work(bytes=dim * size),
        )
        pointers = {
            **dict.fromkeys(("grad", "input", "weight", "grad_input"), f"*{dtype}"),
            **dict.fromkeys(("means", "rstds", "grad_weight", "grad_bias"), "*fp32"),
        }
        yield Shipped(
            name=f"{name} backward",
            kernel=_backward,
            signature={**pointers, "rows": "i32"},
            constants={**shape, "SUM_WEIGHT": True, "SUM_BIAS": centred},
            num_warps=_warps(block),
            num_stages=3,
            divisible_by_16=(*pointers, "rows"),
            work=Work(bytes=2 * dim * size),
        )
