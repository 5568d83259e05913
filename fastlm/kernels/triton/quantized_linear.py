"""y = x W^T + b with W in blocks of 32 small integers that are never expanded in memory: Q8_0, Q4_0 and Q4_1.

The weight lies in planes (`QuantizedTensor.to`): the codes [K / 32, N, 16 or 32 bytes], then the scales [K / 32, N]
and, of Q4_1, the minima. So a tile of codes is one run of memory. Codes and inputs meet as integers and in halves of
blocks: columns 0 to 15 and 16 to 31, the low and the high nibbles of its bytes. The scale follows once per block.

One row of input is a matter of reading the weight (`_one_row`). More rows go through the tensor cores (`_rows`), in
which codes are exact as bfloat16 or float16, and float32 inputs are the sum of three bfloat16 parts: nothing is lost.
Hundreds of rows in bfloat16 or float16 are a matter of arithmetic (`_many_rows`): there the weight is scaled first and
rounded to the input's dtype, so that sums stay in the tensor cores from the first block to the last; and it is the left
factor, y^T = W x^T, which those of sm_90 take from registers.

Small matrices make fewer programs than a GPU runs at once: then each sums a part of k (`Plan.of`), and `_sum_parts`
adds the parts in one order, so that results are the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton.attention_config import architecture
from fastlm.kernels.triton.shipped import TARGETS, Shipped, Work

__all__ = ["linear", "shipped"]

MANY_OUTPUTS = 128
"""Outputs to a program of `_many_rows`."""
MULTIPROCESSORS = 128
"""To be given work. The same for every GPU, for results must not depend on it."""
MOST_PARTS = 64
"""Of k, for one program of `_sum_parts` holds a place's sums of all of them."""
SUMMED = 64
"""Results to a program of `_sum_parts`: few, so that the second launch fills a GPU as well."""
BYTES = {"Q8_0": 32, "Q4_0": 16, "Q4_1": 16}
"""Bytes of codes in a block of 32 weights."""


@triton.jit
def _float(code, zero: tl.constexpr):
    """code - zero as float32, code from 0 to 255, without the slow conversion: 2^23 + code has it as its last bits."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def _halves(codes, at, mask, KIND: tl.constexpr):
    """The first and the last 16 weights of blocks, before their scale, as float32; `at` has the first 16 bytes."""
    if KIND == "Q8_0":
        low = _float(tl.load(codes + at, mask=mask, other=0) ^ 0x80, 128)
        high = _float(tl.load(codes + at + 16, mask=mask, other=0) ^ 0x80, 128)
    else:
        zero: tl.constexpr = 8 if KIND == "Q4_0" else 0
        both = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
        # The high nibble where it is counts 16 times; a multiplication and subtraction in one undo it exactly.
        low, high = _float(both & 15, zero), _float(both & 0xF0, 0) * 0.0625 - zero
    return low, high


@triton.jit
def _part(blocks, part):
    """The blocks of 32 columns that this program sums: those of its part of k, `part` of them."""
    first = tl.program_id(1) * part
    return first, tl.minimum(first + part, blocks)


@triton.jit
def _place(output, rows, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(m, n, which m exist, which n exist, output) of this program: rows, outputs, and the matrix of its part of k.

    Programs that share a tile of the weight are neighbours: it comes from memory once.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n, m < rows, n < outputs, output + tl.program_id(1).to(tl.int64) * rows * outputs


@triton.jit(do_not_specialize=["part"])
def _one_row(
    input,
    codes,
    scales,
    minima,
    bias,
    output,
    outputs,
    blocks,
    part,
    KIND: tl.constexpr,
    BYTES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # in blocks of 32
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 16)
    used = n < outputs
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    first, last = _part(blocks, part)
    for begin in tl.range(first, last, BLOCK_K):
        block = begin + tl.arange(0, BLOCK_K)
        inside = block < last
        mask = inside[:, None] & used[None, :]
        place = block[:, None].to(tl.int64) * outputs + n[None, :]
        low, high = _halves(codes, place[:, :, None] * BYTES + byte[None, None, :], mask[:, :, None], KIND)
        x_at = input + block[:, None] * 32 + byte[None, :]
        x_low = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
        x_high = tl.load(x_at + 16, mask=inside[:, None], other=0.0).to(tl.float32)
        products = tl.sum(low * x_low[:, None, :] + high * x_high[:, None, :], 2)
        acc += products * tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        if KIND == "Q4_1":
            total = tl.sum(x_low + x_high, 1)
            acc += total[:, None] * tl.load(minima + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.sum(acc, 0)
    if BIAS:
        y += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)
    tl.store(output + tl.program_id(1) * outputs + n, y.to(output.dtype.element_ty), mask=used)


@triton.jit
def _rounded(x):
    """x rounded to bfloat16, and what that leaves; nothing is left of what is not finite."""
    part = x.to(tl.bfloat16)
    back = part.to(tl.float32)
    return part, tl.where(tl.abs(back) < float("inf"), x - back, 0.0)


@triton.jit
def _product(x, q, acc):
    """acc + x q, q being small integers as float32: exact products, summed in float32."""
    if x.dtype == tl.float32:
        q = q.to(tl.bfloat16)
        first, rest = _rounded(x)
        second, rest = _rounded(rest)
        acc = tl.dot(rest.to(tl.bfloat16), q, acc)
        acc = tl.dot(second, q, acc)
        acc = tl.dot(first, q, acc)
    else:
        acc = tl.dot(x, q.to(x.dtype), acc)
    return acc


@triton.jit(do_not_specialize=["part"])
def _rows(
    input,
    codes,
    scales,
    minima,
    bias,
    output,
    rows,
    outputs,
    blocks,
    part,
    KIND: tl.constexpr,
    BYTES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n, here, used, output = _place(output, rows, outputs, BLOCK_M, BLOCK_N)
    first, last = _part(blocks, part)
    byte = tl.arange(0, 16)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_at = input + m[:, None] * (blocks * 32) + byte[None, :]
    for block in tl.range(first, last):
        place = n.to(tl.int64) + block * outputs
        low, high = _halves(codes, place[None, :] * BYTES + byte[:, None], used[None, :], KIND)
        x_low = tl.load(x_at + block * 32, mask=here[:, None], other=0.0)
        x_high = tl.load(x_at + block * 32 + 16, mask=here[:, None], other=0.0)
        products = _product(x_high, high, _product(x_low, low, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)))
        acc += products * tl.load(scales + place, mask=used, other=0.0).to(tl.float32)[None, :]
        if KIND == "Q4_1":
            total = tl.sum(x_low.to(tl.float32) + x_high.to(tl.float32), 1)
            acc += total[:, None] * tl.load(minima + place, mask=used, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * outputs + n[None, :]
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=here[:, None] & used[None, :])


@triton.jit(do_not_specialize=["part"])
def _many_rows(
    input,
    codes,
    scales,
    minima,
    bias,
    output,
    rows,
    outputs,
    blocks,
    part,
    KIND: tl.constexpr,
    BYTES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n, here, used, output = _place(output, rows, outputs, BLOCK_M, BLOCK_N)
    first, last = _part(blocks, part)
    byte = tl.arange(0, 16)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_at = input + m[None, :] * (blocks * 32) + byte[:, None]
    for block in tl.range(first, last):
        place = n.to(tl.int64) + block * outputs
        low, high = _halves(codes, place[:, None] * BYTES + byte[None, :], used[:, None], KIND)
        scale = tl.load(scales + place, mask=used, other=0.0).to(tl.float32)[:, None]
        low, high = low * scale, high * scale
        if KIND == "Q4_1":
            least = tl.load(minima + place, mask=used, other=0.0).to(tl.float32)[:, None]
            low, high = low + least, high + least
        x_low = tl.load(x_at + block * 32, mask=here[None, :], other=0.0)
        x_high = tl.load(x_at + block * 32 + 16, mask=here[None, :], other=0.0)
        acc = tl.dot(low.to(x_low.dtype), x_low, acc)
        acc = tl.dot(high.to(x_high.dtype), x_high, acc)
    if BIAS:
        acc += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)[:, None]
    at = m[None, :] * outputs + n[:, None]
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=here[None, :] & used[:, None])


@triton.jit
def _sum_parts(
    partial,  # [parts, rows, outputs]
    bias,
    output,
    elements,  # rows * outputs
    outputs,
    parts,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,  # the next power of two
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS).to(tl.int64)
    used = at < elements
    mask = (part < parts)[:, None] & used[None, :]
    y = tl.sum(tl.load(partial + part[:, None] * elements + at[None, :], mask=mask, other=0.0), 0)
    if BIAS:
        y += tl.load(bias + at % outputs, mask=used, other=0.0).to(tl.float32)
    tl.store(output + at, y.to(output.dtype.element_ty), mask=used)


def linear(
    input: Tensor, codes: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, kind: str
) -> Tensor:
    """input [..., K] in float32, float16 or bfloat16 times a weight's planes; the result in the input's dtype.

    Args:
        codes: uint8 [K / 32, N, 16 or 32].
        scales, minima: float16 [K / 32, N]; minima for Q4_1 alone.
        bias: [N] or None.
    """
    blocks, outputs, _ = codes.shape
    x = input.reshape(input.shape[:-1].numel(), blocks * 32).contiguous()
    rows = len(x)
    output = x.new_empty(rows, outputs)
    if not blocks:
        output = output.zero_() if bias is None else output.copy_(bias.expand(rows, -1))
    elif output.numel():
        bias = None if bias is None else bias.contiguous()
        plan = Plan.of(rows, outputs, blocks, x.element_size(), architecture(x.device))
        split = plan.parts > 1
        plan.kernel[plan.programs, plan.parts](
            x,
            codes,
            scales,
            minima,
            None if split else bias,
            partial := x.new_empty(plan.parts, rows, outputs, dtype=torch.float32) if split else output,
            *(() if rows == 1 else (rows,)),
            outputs,
            blocks,
            plan.part,
            KIND=kind,
            BYTES=BYTES[kind],
            BIAS=bias is not None and not split,
            **plan.sizes,
            num_warps=plan.warps,
            num_stages=3,
        )
        if split:
            _sum_parts[(triton.cdiv(output.numel(), SUMMED),)](
                partial,
                bias,
                output,
                output.numel(),
                outputs,
                plan.parts,
                BIAS=bias is not None,
                PARTS=triton.next_power_of_2(plan.parts),
                BLOCK=SUMMED,
                num_warps=4,
            )
    return output.view(*input.shape[:-1], outputs)


class Plan(NamedTuple):
    """How a product is launched: a function of its shapes and the architecture, so that its bits are too."""

    kernel: Any
    sizes: dict[str, int]
    """Of a program's tile, by the names that the kernel has for them."""
    warps: int
    programs: int
    """That it takes to cover rows and outputs."""
    part: int
    """Blocks of 32 columns that a program sums."""
    parts: int
    """Of k: their sums, float32, are added in a second launch, in one order."""

    @staticmethod
    def of(rows: int, outputs: int, blocks: int, element_size: int, architecture: str) -> Plan:
        """The plan for `rows` of input, in numbers of `element_size` bytes, and a weight [outputs, 32 * blocks].

        Where rows and outputs alone make fewer programs than a GPU runs at once, k is cut into as many parts as fill
        it; but none is shorter than `least`, below which starting a program, and writing and reading its sums, costs
        what is gained.
        """
        kernel, warps, least = _rows, 4, 16
        if rows == 1:
            block_m, block_n = 1, one_row_tile(outputs)
            block_k = 128 // block_n
            kernel, least = _one_row, 4 * block_k
            sizes = {"BLOCK_N": block_n, "BLOCK_K": block_k}
        else:
            block_m, block_n = many_rows_tile(rows, outputs, element_size, architecture), MANY_OUTPUTS
            if block_m:
                kernel, warps = _many_rows, 8
            else:
                block_m, block_n = rows_tile(rows, outputs, element_size)
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        resident = 4 if block_m <= 32 else 2 if block_m <= 128 else 1  # that a multiprocessor's registers hold
        programs = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
        part = triton.cdiv(blocks, max(1, min(resident * MULTIPROCESSORS // programs, blocks // least, MOST_PARTS)))
        return Plan(kernel, sizes, warps, programs, part, triton.cdiv(blocks, part))


def one_row_tile(outputs: int) -> int:
    """Outputs to a program: few where there are few of them, so that all of a GPU reads."""
    return 16 if outputs > 16384 else 8 if outputs > 2048 else 4


def rows_tile(rows: int, outputs: int, element_size: int) -> tuple[int, int]:
    """Rows of input and outputs to a program: large tiles where there is work for all of a GPU.

    Of 64 by 128, with float32's parts, registers would overflow; eight warps read shared memory twice as often. Of 32
    by 32 with those, Q8_0 spills 8 bytes on sm_100.
    """
    block_m = min(max(16, triton.next_power_of_2(rows)), 64)
    small = outputs <= 4096 and rows <= 64 and (element_size == 2 or block_m != 32)
    return block_m, 32 if small else 128 if block_m == 64 and element_size == 2 else 64


def many_rows_tile(rows: int, outputs: int, element_size: int, architecture: str) -> int:
    """Rows of input to a program of `_many_rows`; 0 where `_rows` does better.

    What a program does to unpack its weights is shared by its rows: twice as many where the tensor cores are that fast,
    and where there is work for all of a GPU. gfx942 rounds to bfloat16 in software, which costs it more than is saved.
    """
    if element_size != 2 or rows <= 64 or architecture == "gfx942":
        return 0
    programs = triton.cdiv(rows, 256) * triton.cdiv(outputs, MANY_OUTPUTS)
    return 256 if architecture in ("sm_90", "sm_100") and rows > 128 and programs >= 128 else 128


def shipped() -> Iterator[Shipped]:
    """Every kind, one row and several, at the dtypes that models run in; with k in parts, sums in float32."""
    for dtype, parts, bias in (("bf16", 4, False), ("bf16", 16, True), ("fp32", 64, True)):
        pointers = {"partial": "*fp32", "output": f"*{dtype}"} | ({"bias": f"*{dtype}"} if bias else {})
        yield Shipped(
            name=f"quantized_linear {dtype} sum of {parts} parts{' bias' if bias else ''}",
            kernel=_sum_parts,
            signature={**pointers, "elements": "i32", "outputs": "i32", "parts": "i32"},
            constants={**({} if bias else {"bias": None}), "BIAS": bias, "PARTS": parts, "BLOCK": SUMMED},
            num_warps=4,
            num_stages=3,
            divisible_by_16=(*pointers, "elements", "outputs"),
            work=Work(bytes=4 * parts * SUMMED),
        )
    for kind, size in BYTES.items():
        pointers = {"codes": "*u8", "scales": "*fp16"} | ({"minima": "*fp16"} if kind == "Q4_1" else {})
        none = {"bias": None} | ({} if kind == "Q4_1" else {"minima": None})
        fixed = {"KIND": kind, "BYTES": size, "BIAS": False, **none}
        for dtype, tile, result in (
            *((dtype, tile, dtype) for dtype in ("bf16", "fp32") for tile in (4, 8, 16)),
            ("fp16", 8, "fp16"),
            ("bf16", 4, "fp32"),
        ):
            floats = {"input": f"*{dtype}", "output": f"*{result}"}
            yield Shipped(
                name=f"quantized_linear {kind} {dtype} one row n{tile}{'' if result == dtype else ' in parts'}",
                kernel=_one_row,
                signature={**floats, **pointers, "outputs": "i32", "blocks": "i32", "part": "i32"},
                constants={**fixed, "BLOCK_N": tile, "BLOCK_K": 128 // tile},
                num_warps=4,
                num_stages=3,
                divisible_by_16=(*floats, *pointers, "outputs"),
                work=Work(bytes=128 * (size + (4 if kind == "Q4_1" else 2))),
            )
        nvidia = tuple(target for target in TARGETS if target != "gfx942")
        for dtype, block_m, result, targets in (
            ("bf16", 128, "bf16", nvidia),
            ("fp16", 128, "fp16", nvidia),
            ("bf16", 128, "fp32", nvidia),
            ("bf16", 256, "bf16", ("sm_90", "sm_100")),
            ("fp16", 256, "fp16", ("sm_90", "sm_100")),
        ):
            floats = {"input": f"*{dtype}", "output": f"*{result}"}
            yield Shipped(
                name=f"quantized_linear {kind} {dtype} m{block_m} n{MANY_OUTPUTS}"
                f"{'' if result == dtype else ' in parts'}",
                kernel=_many_rows,
                signature={**floats, **pointers, "rows": "i32", "outputs": "i32", "blocks": "i32", "part": "i32"},
                constants={**fixed, "BLOCK_M": block_m, "BLOCK_N": MANY_OUTPUTS},
                num_warps=8,
                num_stages=3,
                targets=targets,
                divisible_by_16=(*floats, *pointers, "outputs"),
                # Neighbours read the same weights, and others the same inputs: most of it comes from L2.
                work=Work(
                    tensor_flops=2 * block_m * MANY_OUTPUTS * 32,
                    bytes=MANY_OUTPUTS * (size + (4 if kind == "Q4_1" else 2)) + block_m * 32 * 2,
                ),
                must_use=("wgmma", "tcgen05"),
            )
        for dtype, rows, outputs, result in (
            ("bf16", 8, 4096, "bf16"),
            ("bf16", 8, 4096, "fp32"),
            ("bf16", 64, 16384, "fp32"),
            *(("bf16", rows, outputs, "bf16") for rows, outputs in ((8, 16384), (32, 4096), (32, 16384))),
            *(("bf16", 64, outputs, "bf16") for outputs in (4096, 16384)),
            *(("fp16", rows, outputs, "fp16") for rows, outputs in ((8, 4096), (64, 16384))),
            *(("fp32", rows, outputs, "fp32") for rows, outputs in ((8, 4096), (8, 16384), (32, 16384), (64, 4096))),
            ("fp32", 512, 4096, "fp32"),
        ):
            block_m, block_n = rows_tile(rows, outputs, 4 if dtype == "fp32" else 2)
            floats = {"input": f"*{dtype}", "output": f"*{result}"}
            parts = 3 if dtype == "fp32" else 1
            yield Shipped(
                name=f"quantized_linear {kind} {dtype} m{block_m} n{block_n}{'' if result == dtype else ' in parts'}",
                kernel=_rows,
                signature={**floats, **pointers, "rows": "i32", "outputs": "i32", "blocks": "i32", "part": "i32"},
                constants={**fixed, "BLOCK_M": block_m, "BLOCK_N": block_n},
                num_warps=4,
                num_stages=3,
                divisible_by_16=(*floats, *pointers, "outputs"),
                work=Work(
                    tensor_flops=2 * block_m * block_n * 32 * parts,
                    bytes=block_n * (size + (4 if kind == "Q4_1" else 2))
                    + block_m * 32 * (4 if dtype == "fp32" else 2),
                    streamed=True,
                ),
            )
