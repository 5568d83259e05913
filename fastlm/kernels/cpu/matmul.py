"""Native products of bfloat16 matrices: csrc/cpu/matmul.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["matmul", "worthwhile"]

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
