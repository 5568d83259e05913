"""Native products of matrices, bfloat16 and float32: csrc/cpu/matmul.cpp and float_matmul.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["float_matmul", "float_worthwhile", "matmul", "product", "worthwhile"]

# Of the second matrix, in bytes of bfloat16: every 32 rows of the first go past all of it, which pays while it stays in
# the level-2 cache.
_SECOND = 1 << 20


def worthwhile(second: Tensor) -> bool:
    """Whether `matmul` is quicker than torch's for this second factor, however it is turned."""
    return 2 * second.numel() <= _SECOND and native.CPU.module is not None and bool(native.CPU.module.matmul_tiles())


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    turn_a: bool = False,
    turn_b: bool = False,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a b + bias [N] of matrices, a [M, K], or [K, M] where it is to be turned, b [K, N] or [N, K].

    Contiguous float32 (rounded to bfloat16 first) or bfloat16; summed in float32; the result is `dtype`, one of these.
    """
    (depth, rows), columns = a.shape if turn_a else a.shape[::-1], b.shape[0 if turn_b else 1]
    output = a.new_empty(rows, columns, dtype=dtype)
    native.CPU.require().matmul(
        a.data_ptr(),
        a.shape[1],
        turn_a,
        a.dtype is torch.bfloat16,
        b.data_ptr(),
        b.shape[1],
        turn_b,
        b.dtype is torch.bfloat16,
        native.address(bias),
        output.data_ptr(),
        dtype is torch.bfloat16,
        rows,
        columns,
        depth,
        native.num_threads(),
    )
    return output


# Rows and columns of a product below which packing the factors costs what the tile unit gains: of float32 factors, and
# where the second is narrower, has fewer parts to multiply, and would have to be expanded for torch.
_FEW, _FEW_OF_NARROW, _SHALLOW = 64, 32, 64


_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _lies(x: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix with contiguous rows or, turned, columns; the elements from one to the next; whether it is turned."""
    (rows, columns), (down, along) = x.shape, x.stride()
    if along == 1 and (down >= columns or rows == 1):
        return x, max(down, columns), False
    if down == 1 and (along >= rows or columns == 1):
        return x, max(along, rows), True
    return x.contiguous(), columns, False


def float_matmul(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """a b + bias [N] of matrices a [M, K], float32, and b [K, N], float32, float16 or bfloat16, as accurate as float32.

    Each may be the transpose of a matrix in memory. `out` is float32 [M, N] with contiguous rows and no part of a or b;
    with `add` the product is added to what it holds. A row's bits depend on that row of a and on b alone.
    """
    a, a_stride, turn_a = _lies(a)
    b, b_stride, turn_b = _lies(b)
    (rows, depth), columns = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty(rows, columns)
    native.CPU.require().float_matmul(
        a.data_ptr(),
        a_stride,
        turn_a,
        b.data_ptr(),
        b_stride,
        turn_b,
        _NUMBERS[b.dtype],
        native.address(bias),
        out.data_ptr(),
        max(out.stride(0), columns),
        add,
        rows,
        columns,
        depth,
        native.num_threads(),
    )
    return out


def float_worthwhile(rows: int, columns: int, depth: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `float_matmul` of such sizes, its second factor of that dtype, is quicker than torch's product."""
    few = _FEW if dtype is torch.float32 else _FEW_OF_NARROW
    large = rows >= few and columns >= 128 and depth >= _SHALLOW
    return large and native.CPU.module is not None and bool(native.CPU.module.matmul_tiles())


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False, tiles: bool = True) -> Tensor:
    """a b of matrices by the quicker of `float_matmul`, where `tiles` allows it, and torch; `out`, `add` as there."""
    tiles = tiles and a.is_cpu and a.dtype is torch.float32 and b.dtype is torch.float32
    if tiles and float_worthwhile(len(a), b.shape[1], len(b)):
        return float_matmul(a, b, out=out, add=add)
    if add and out is not None:
        return out.addmm_(a, b)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
