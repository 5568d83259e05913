"""Products with weights in GGUF's formats, and their expansion: csrc/include/fastlm/linear.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastlm.kernels import native
from fastlm.kernels.cpu.memory import CPU, take

__all__ = ["CPU", "dequantize_rows", "interleave", "linear", "rounding_for"]


def interleave(weight: Tensor, code: int, outputs: int, columns: int) -> Tensor:
    """The copy of a weight of a Q kind that integer products read, for the active instruction-set level."""
    module = native.CPU.require()
    with _disable_current_modes():  # none of a recorded step's business
        packed = take(module.interleaved_bytes(outputs, columns, code))
        module.interleave(weight.data_ptr(), packed.data_ptr(), outputs, columns, code, native.num_threads())
    return packed


def rounding_for(bits: int) -> int:
    """The `rounding` that keeps 8 or 15 bits; where there are tiles of bytes (AMX), 15 in any case: as fast there."""
    return 1 if bits == 8 and not native.CPU.require().matmul_tiles() else 2


def linear(
    input: Tensor, weights: Sequence[tuple[Tensor, int, int, Tensor | None]], *, rounding: int = 0
) -> list[Tensor]:
    """y = x W^T + b in float32 for up to 4 weights, each read from memory once for a dozen rows.

    Args:
        input: [..., K] on the CPU, of a floating dtype no wider than float32.
        weights: of each its bytes (contiguous on the CPU), the number of its kind in csrc/include/fastlm/linear.h, its
            outputs N, and its bias [N] or None. With a rounding, the bytes of the Q kinds are what `interleave` made.
        rounding: of the input where it meets Q kinds: 0, none; 1 or 2, that to 8 or 15 bits, for integer products.

    Returns:
        Of each weight [..., N] in the input's dtype.
    """
    # A decode step comes here hundreds of times, for products of a few microseconds: every attribute counts.
    *batch, columns = input.shape
    dtype = input.dtype
    x = input if dtype is torch.float32 and input.is_contiguous() else input.float().contiguous()
    outputs, calls, kept = [], [], []
    for weight, code, size, bias in weights:
        if bias is not None and not (bias.dtype == torch.float32 and bias.is_contiguous()):
            bias = bias.float().contiguous()
            kept.append(bias)
        y = x.new_empty((*batch, size))
        outputs.append(y)
        calls.append((weight.data_ptr(), native.address(bias), y.data_ptr(), size, code))
    module = native.CPU.module or native.CPU.require()
    module.linear(x.data_ptr(), calls, rounding, math.prod(batch), columns, native.num_threads())
    return outputs if dtype is torch.float32 else [y.to(dtype) for y in outputs]


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
        native.address(ids),
        output.data_ptr(),
        first,
        rows,
        outputs,
        columns,
        code,
        native.num_threads(),
    )
    return bad
