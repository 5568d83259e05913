"""GELU (tanh form) and SwiGLU, forward and backward, in one pass over memory each.

gelu(x) = x / 2 (1 + tanh u) = x sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
swiglu(g, v) = g sigmoid(g) v
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["gelu", "shipped", "swiglu"]

BLOCK = 1024
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def _forward(
    gate,
    up,
    output,
    columns,
    stride_gate,
    stride_up,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        result = g * tl.sigmoid(g) * tl.load(up + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    else:
        result = g * tl.sigmoid((g + 0.044715 * g * g * g) * _TWICE_ROOT)
    tl.store(output + row * columns + column, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    columns,
    stride_grad,
    stride_gate,
    stride_up,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dy = tl.load(grad + row * stride_grad + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        s = tl.sigmoid(g)
        v = tl.load(up + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_up + row * columns + column, (dy * g * s).to(grad_up.dtype.element_ty), mask=inside)
        slope = v * s * (1.0 + g * (1.0 - s))
    else:
        s = tl.sigmoid((g + 0.044715 * g * g * g) * _TWICE_ROOT)
        slope = s * (1.0 + g * (1.0 - s) * _TWICE_ROOT * (1.0 + 3 * 0.044715 * g * g))
    tl.store(grad_gate + row * columns + column, (dy * slope).to(grad_gate.dtype.element_ty), mask=inside)


def _matrix(*tensors: Tensor) -> list[Tensor]:
    """The tensors, of one shape, as matrices with contiguous rows: one long row where they are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    matrices = [t.reshape(-1, t.shape[-1]) for t in tensors]  # halves of a wider tensor stay where they are
    return [m if m.stride(1) == 1 else m.contiguous() for m in matrices]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        ctx.save_for_backward(gate, up)
        if not output.numel():
            return output
        g, v = _matrix(gate, gate if up is None else up)
        rows, columns = g.shape
        _forward[(triton.cdiv(columns, BLOCK) * rows,)](
            g, v, output, columns, g.stride(0), v.stride(0), GATED=up is not None, BLOCK=BLOCK, num_warps=4
        )
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_up = None if up is None else torch.empty_like(grad_gate)
        if grad_gate.numel():
            dy, g, v = _matrix(grad, gate, gate if up is None else up)
            rows, columns = g.shape
            _backward[(triton.cdiv(columns, BLOCK) * rows,)](
                dy,
                g,
                v,
                grad_gate,
                grad_up,
                columns,
                dy.stride(0),
                g.stride(0),
                v.stride(0),
                GATED=up is not None,
                BLOCK=BLOCK,
                num_warps=4,
            )
        return grad_gate, grad_up


def gelu(input: Tensor) -> Tensor:
    """The tanh form of GELU of a tensor of any shape; differentiable once."""
    result: Tensor = _Activation.apply(input, None)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one shape; differentiable once."""
    result: Tensor = _Activation.apply(gate, up)
    return result


def shipped() -> Iterator[Shipped]:
    """Both functions, forward and backward."""
    for gated, dtype in ((False, "bf16"), (True, "bf16"), (True, "fp32")):
        name = f"{'swiglu' if gated else 'gelu'} {dtype}"
        size = {"bf16": 2, "fp32": 4}[dtype]
        for kernel, wide in ((_forward, ("gate", "up", "output")), (_backward, ("grad", "gate", "up", "grad_gate"))):
            pointers = dict.fromkeys((*wide, *(("grad_up",) if gated and kernel is _backward else ())), f"*{dtype}")
            integers = [
                name for name in ("columns", "stride_grad", "stride_gate", "stride_up") if name in kernel.arg_names
            ]
            yield Shipped(
                name=f"{name} {'forward' if kernel is _forward else 'backward'}",
                kernel=kernel,
                signature={**pointers, **dict.fromkeys(integers, "i32")},
                constants={
                    "GATED": gated,
                    "BLOCK": BLOCK,
                    **({"grad_up": None} if kernel is _backward and not gated else {}),
                },
                num_warps=4,
                num_stages=3,
                divisible_by_16=(*pointers, *integers),
                work=Work(exponentials=BLOCK, bytes=BLOCK * size * (1 + gated + (kernel is _backward))),
            )
