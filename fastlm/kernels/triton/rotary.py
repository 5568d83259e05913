"""Rotary position embedding; its backward is the same kernel with the angles turned round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["rotary", "shipped"]


@triton.jit
def _rotate(
    input,
    output,
    cos,
    sin,
    starts,
    sign,  # of the angles: -1.0 in the backward pass
    heads,
    tokens,
    stride_ib,
    stride_ih,
    stride_it,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_table,  # between the tables of two sequences; 0 where they share one
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STARTS: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    used = head < heads
    pair = tl.arange(0, PADDED_HALF)
    inside = pair < HALF
    place = token
    if STARTS:
        place += tl.load(starts + batch)
    angle = batch * stride_table + place * HALF + pair
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32) * sign
    first, second = pair, pair + HALF
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    source = (input + batch * stride_ib + token * stride_it) + head[:, None] * stride_ih
    target = (output + batch * stride_ob + token * stride_ot) + head[:, None] * stride_oh
    mask = used[:, None] & inside[None, :]
    x = tl.load(source + first[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + second[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = output.dtype.element_ty
    tl.store(target + first[None, :], (x * c[None, :] - y * s[None, :]).to(dtype), mask=mask)
    tl.store(target + second[None, :], (y * c[None, :] + x * s[None, :]).to(dtype), mask=mask)
    if REST:  # features that pass unchanged
        other = tl.arange(0, PADDED_REST)
        mask = used[:, None] & (other < REST)[None, :]
        tl.store(target + 2 * HALF + other[None, :], tl.load(source + 2 * HALF + other[None, :], mask=mask), mask=mask)


def _heads(heads: int, half: int) -> int:
    """Heads to a program: some 1,024 pairs."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // triton.next_power_of_2(max(half, 1))))


def _run(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None, sign: float) -> Tensor:
    x = input if input.stride(3) == 1 else input.contiguous()
    output = torch.empty_like(x)  # keeps a transposed layout, so that both sides stay coalesced
    batch, heads, tokens, dim = x.shape
    half = cos.shape[-1]
    if not output.numel():
        return output
    block = _heads(heads, half)
    _rotate[(batch * tokens, triton.cdiv(heads, block))](
        x,
        output,
        cos.contiguous(),
        sin.contiguous(),
        starts,
        sign,
        heads,
        tokens,
        *x.stride()[:3],
        *output.stride()[:3],
        tokens * half if starts is None and cos.dim() == 3 else 0,
        HALF=half,
        REST=dim - 2 * half,
        PADDED_HALF=triton.next_power_of_2(max(half, 1)),
        PADDED_REST=triton.next_power_of_2(max(dim - 2 * half, 1)),
        BLOCK_H=block,
        INTERLEAVED=interleaved,
        STARTS=starts is not None,
        num_warps=4,
    )
    return output


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin, starts)
        ctx.interleaved = interleaved
        return _run(input, cos, sin, interleaved, starts, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin, starts = ctx.saved_tensors
        return _run(grad, cos, sin, ctx.interleaved, starts, -1.0), None, None, None, None


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> Tensor:
    """Rotates input [B, H, T, D]; see `fastlm.ops.rotary`. Differentiable once, with respect to the input."""
    result: Tensor = _Rotary.apply(input, cos, sin, interleaved, starts)
    return result


def shipped() -> Iterator[Shipped]:
    """Heads of 64 and 128 with tables of all positions, and GPT-J's partial, interleaved form."""
    for dtype, dim, half, interleaved in (("bf16", 64, 32, False), ("bf16", 128, 64, False), ("fp32", 256, 32, True)):
        block, rest = _heads(32, half), dim - 2 * half
        pointers = {**dict.fromkeys(("input", "output"), f"*{dtype}"), **dict.fromkeys(("cos", "sin"), "*fp32")}
        strides = [f"stride_{name}" for name in ("ib", "ih", "it", "ob", "oh", "ot")]
        yield Shipped(
            name=f"rotary {dtype} d{dim} r{2 * half}{' interleaved' if interleaved else ''}",
            kernel=_rotate,
            signature={
                **pointers,
                "starts": "*i64",
                "sign": "fp32",
                **dict.fromkeys(("heads", "tokens", *strides, "stride_table"), "i32"),
            },
            constants={
                "HALF": half,
                "REST": rest,
                "PADDED_HALF": half,
                "PADDED_REST": triton.next_power_of_2(max(rest, 1)),
                "BLOCK_H": block,
                "INTERLEAVED": interleaved,
                "STARTS": True,
            },
            num_warps=4,
            num_stages=3,
            divisible_by_16=(*pointers, "starts", *strides),
            work=Work(bytes=block * dim * {"bf16": 2, "fp32": 4}[dtype] + 8 * half),
        )
