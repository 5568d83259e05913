"""Products with weights in GGUF's formats, and their expansion: csrc/include/fastlm/linear.h."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["dequantize_rows", "linear"]

BLOCK = 32
CPU = torch.device("cpu")  # buffers are here whatever torch's default device and dtype are


class _Held(threading.local):
    """A thread's scratch memory, and what is asked of it at each call."""

    memory: Tensor | None = None
    address = blocks = 0


_held = _Held()


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
        _scratch(rows * columns // BLOCK) if integer else 0,
        rows,
        outputs,
        columns,
        code,
        native.num_threads(),
    )
    return output if dtype is torch.float32 else output.to(dtype)


def _scratch(blocks: int) -> int:
    """The address of `blocks` InputBlocks that are this thread's until its next call."""
    if _held.blocks < blocks:
        count = max(blocks, 1 << 10)
        _held.memory = torch.empty(count * native.CPU.require().INPUT_BLOCK_BYTES, dtype=torch.uint8, device=CPU)
        _held.address, _held.blocks = _held.memory.data_ptr(), count
    return _held.address


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
