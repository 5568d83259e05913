"""Layer and root-mean-square normalisation, also of a sum, forward and backward, a row to a program.

With x^ = (x - mean) rstd (mean = 0 for rms) and g = dy w:

    dx = rstd (g - mean(g) - x^ mean(g x^))     (no mean(g) for rms)
    dw = sum over rows of dy x^,  db = sum over rows of dy

A sum x = a + b is rounded to its dtype first, so that the bits are those of an addition and a norm of its result. It is
kept, for the next to add to, and its gradient from there comes to dx, which is that of a and of b.

The sums over rows are taken by a fixed number of programs, each over its rows in order, and then added in order:
the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm", "shipped"]

PARTS = 256
"""Programs of the backward pass, each of which leaves a row of partial sums for dw and db."""


@triton.jit
def _forward(
    input,
    residual,
    weight,
    bias,
    output,
    total,
    means,
    rstds,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < DIM
    x = tl.load(input + row * DIM + feature, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual + row * DIM + feature, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + row * DIM + feature, rounded, mask=inside)
        x = rounded.to(tl.float32)
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
    grad_total,
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
    ADD: tl.constexpr,
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
        dx = dx * rstd
        if ADD:
            dx += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_input + at, dx.to(grad_input.dtype.element_ty), mask=inside)
    if SUM_WEIGHT:
        tl.store(grad_weight + part * DIM + feature, sum_weight, mask=inside)
    if SUM_BIAS:
        tl.store(grad_bias + part * DIM + feature, sum_bias, mask=inside)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


class _Norm(torch.autograd.Function):
    """The norm of `input`, or of its sum with `residual`, and that sum."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x = input.contiguous()
        residual, weight, bias = (t if t is None else t.contiguous() for t in (residual, weight, bias))
        dim = x.shape[-1]
        rows = x.numel() // max(dim, 1)
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        output = torch.empty_like(x, dtype=dtype)
        total = None if residual is None else torch.empty_like(output)
        keep = any(ctx.needs_input_grad)
        means = x.new_empty(rows if keep and centred else 0, dtype=torch.float32)
        rstds = x.new_empty(rows if keep else 0, dtype=torch.float32)
        block = triton.next_power_of_2(max(dim, 1))
        if output.numel():
            _forward[(rows,)](
                x,
                residual,
                weight,
                bias,
                output,
                total,
                means,
                rstds,
                float(eps),
                DIM=dim,
                BLOCK=block,
                CENTRED=centred,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                ADD=residual is not None,
                KEEP=keep,
                num_warps=_warps(block),
            )
        ctx.save_for_backward(x if total is None else total, weight, means, rstds)
        ctx.centred, ctx.bias_dtype = centred, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> Any:
        x, weight, means, rstds = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total, None, None, None, None
        dim, rows = x.shape[-1], rstds.shape[0]
        want_residual, want_weight, want_bias = ctx.needs_input_grad[1:4]
        parts = min(rows, PARTS)
        grad_input = torch.empty_like(x)
        sums = x.new_empty((2, parts, dim), dtype=torch.float32)
        block = triton.next_power_of_2(max(dim, 1))
        if x.numel():
            _backward[(parts,)](
                grad.contiguous(),
                None if grad_total is None else grad_total.contiguous(),
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
                ADD=grad_total is not None,
                num_warps=_warps(block),
            )
        return (
            grad_input,
            grad_input if want_residual else None,
            sums[0].sum(0).to(weight.dtype) if want_weight else None,
            sums[1].sum(0).to(ctx.bias_dtype) if want_bias else None,
            None,
            None,
        )


def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., dim], weight [dim]; differentiable once."""
    result: Tensor = _Norm.apply(input, None, weight, None, eps, False)[0]
    return result


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of [..., dim]; differentiable once."""
    result: Tensor = _Norm.apply(input, None, weight, bias, eps, True)[0]
    return result


def add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of input + residual, in the wider of their dtypes, and that sum; differentiable once."""
    result: tuple[Tensor, Tensor] = _Norm.apply(input, residual, weight, None, eps, False)
    return result


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of input + residual, in the wider of their dtypes, and that sum; differentiable once."""
    result: tuple[Tensor, Tensor] = _Norm.apply(input, residual, weight, bias, eps, True)
    return result


def shipped() -> Iterator[Shipped]:
    """Both norms, plain and of a sum, forward and backward, at usual widths."""
    widths = ((False, "bf16", 576), (False, "bf16", 4096), (True, "bf16", 768), (True, "fp32", 8192))
    for add, (centred, dtype, dim) in product((False, True), widths):
        block = triton.next_power_of_2(dim)
        name = f"{'add_' if add else ''}{'layer_norm' if centred else 'rms_norm'} {dtype} d{dim}"
        size = {"bf16": 2, "fp32": 4}[dtype]
        used = ["input", *(("residual", "total") if add else ()), "weight", *(("bias",) if centred else ()), "output"]
        absent = {argument: None for argument in ("residual", "total", "bias") if argument not in used}
        shape = {"DIM": dim, "BLOCK": block, "CENTRED": centred, "WEIGHT": True, "ADD": add}
        pointers = dict.fromkeys(used, f"*{dtype}") | {"means": "*fp32", "rstds": "*fp32"}
        yield Shipped(
            name=f"{name} forward",
            kernel=_forward,
            signature={**pointers, "eps": "fp32"},
            constants={**shape, **absent, "BIAS": centred, "KEEP": True},
            num_warps=_warps(block),
            num_stages=3,
            divisible_by_16=tuple(pointers),
            work=Work(bytes=(1 + add) * dim * size),
        )
        used = ["grad", *(("grad_total",) if add else ()), "input", "weight", "grad_input"]
        pointers = {
            **dict.fromkeys(used, f"*{dtype}"),
            **dict.fromkeys(("means", "rstds", "grad_weight", "grad_bias"), "*fp32"),
        }
        yield Shipped(
            name=f"{name} backward",
            kernel=_backward,
            signature={**pointers, "rows": "i32"},
            constants={**shape, **({} if add else {"grad_total": None}), "SUM_WEIGHT": True, "SUM_BIAS": centred},
            num_warps=_warps(block),
            num_stages=3,
            divisible_by_16=(*pointers, "rows"),
            work=Work(bytes=(2 + add) * dim * size),
        )
