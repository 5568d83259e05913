"""Products with weights in GGUF's formats, and their expansion: csrc/include/fastlm/linear.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["dequantize_rows", "linear"]

CPU = torch.device("cpu")  # buffers are here whatever torch's default device and dtype are


def linear(input: Tensor, weight: Tensor, code: int, outputs: int, bias: Tensor | None, *, integer: bool) -> Tensor:
    """y = x W^T + b in float32, each weight read once for all rows.

    Args:
        input: [..., K] on the CPU, of a floating dtype no wider than float32.
        weight: contiguous on the CPU; its bytes are those of [outputs, K] weights of the kind numbered `code`.
        code: the number of the kind in csrc/include/fastlm/linear.h.
        outputs: N.
        bias: [N] or None.
        integer: round the input to int8 and multiply integers (Q kinds only).

    Returns:
        [..., N] in the input's dtype.
    """
    # A decode step comes here hundreds of times, for products of a few microseconds: every attribute counts.
    *batch, columns = input.shape
    dtype = input.dtype
    x = input if dtype is torch.float32 and input.is_contiguous() else input.float().contiguous()
    b = bias if bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()) else bias.float().contiguous()
    output = x.new_empty((*batch, outputs))
    rows = math.prod(batch)
    module = native.CPU.module or native.CPU.require()
    module.linear(
        x.data_ptr(),
        weight.data_ptr(),
        0 if b is None else b.data_ptr(),
        output.data_ptr(),
        integer,
        rows,
        outputs,
        columns,
        code,
        native.num_threads(),
    )
    return output if dtype is torch.float32 else output.to(dtype)


def dequantize_rows(
    weight: Tensor, code: int, outputs: int, output: Tensor, *, ids: Tensor | None = None, first: int = 0
) -> int:
    """Fills `output`, contiguous float32 [rows, K], with rows `ids` (contiguous int64) or `first`, `first` + 1, ...

    Returns:
        -1, or the first position in `ids` that is not in [0, outputs).
    """
    rows, columns = output.shape
    module = native.CPU.require()
    bad: int = module.dequantize_rows(
        weight.data_ptr(),
        0 if ids is None else ids.data_ptr(),
        output.data_ptr(),
        first,
        rows,
        outputs,
        columns,
        code,
        native.num_threads(),
    )
    return bad
