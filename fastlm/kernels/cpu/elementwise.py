"""The small native kernels between larger ones: csrc/include/fastlm/elementwise.h and kv_append.h."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["KV_TYPES", "add", "convert", "copy_rows", "kv_append", "offset"]

KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""The dtypes of a key-value cache and their numbers in csrc/include/fastlm/kv_append.h."""


def add(a: Tensor, b: Tensor, output: Tensor) -> None:
    """output = a + b: contiguous float32 of one size; the output may be one of them."""
    native.CPU.require().add(a.data_ptr(), b.data_ptr(), output.data_ptr(), a.numel(), native.num_threads())


def convert(input: Tensor, dtype: torch.dtype) -> Tensor:
    """`input`, float32 or bfloat16, in the other of these dtypes, contiguous; itself where it has that dtype."""
    if input.dtype is dtype:
        return input
    source = input.contiguous()
    output = torch.empty_like(source, dtype=dtype)
    native.CPU.require().convert(
        source.data_ptr(), output.data_ptr(), source.numel(), dtype is torch.bfloat16, native.num_threads()
    )
    return output


def copy_rows(
    source: Tensor, target: Tensor, *, source_index: Tensor | None = None, target_index: Tensor | None = None
) -> None:
    """target[target_index] = source[source_index] along the first dimension; contiguous tensors of one dtype."""
    index = target if target_index is None else target_index
    rows = len(index if source_index is None else source_index)
    size = source[0].numel() * source.element_size() if len(source) else 0
    native.CPU.require().copy_rows(
        source.data_ptr(),
        len(source),
        native.address(source_index),
        target.data_ptr(),
        len(target),
        native.address(target_index),
        rows,
        size,
    )


def offset(
    source: Tensor, amount: int, target: Tensor, source_index: Tensor | None, target_index: Tensor | None
) -> None:
    """target[target_index] = source[source_index] + amount; contiguous int64 [n], the target may be the source."""
    index = target if target_index is None else target_index
    count = len(index if source_index is None else source_index)
    native.CPU.require().offset(
        source.data_ptr(),
        len(source),
        native.address(source_index),
        amount,
        target.data_ptr(),
        len(target),
        native.address(target_index),
        count,
    )


def kv_append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None) -> None:
    """Writes float32 key, value [B, KVH, T, D] to caches [R, KVH, S, D] of any kind; see `ops.kv_append`."""
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (key, value))
    native.CPU.require().kv_append(
        key.shape,
        key.data_ptr(),
        key.stride(),
        value.data_ptr(),
        value.stride(),
        keys.shape,
        KV_TYPES[keys.dtype],
        keys.data_ptr(),
        keys.stride(),
        values.data_ptr(),
        values.stride(),
        starts.data_ptr(),
        native.address(rows),
        native.num_threads(),
    )
