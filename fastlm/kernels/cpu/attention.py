"""Native attention: csrc/cpu/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["attention"]


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _layout(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, H, Tq, Dv], stored as [B, Tq, H, Dv], and with `save` the log-sum-exp [B, H, Tq] of the scores.

    See `fastlm.ops.attention`; the tensors are float32 (the mask bool or floating) and not empty.
    """
    batch, heads, queries, _ = query.shape
    query, key, value = _rows(query), _rows(key), _rows(value)
    given = None
    if mask is not None:
        if mask.dtype != torch.bool:
            mask = mask.to(torch.float32)
        given = mask.data_ptr(), mask.expand(batch, heads, queries, key.shape[2]).stride()
    slopes_stride = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(torch.float32).contiguous()
        slopes_stride = heads if alibi_slopes.dim() == 2 else 0
    output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries) if save else None
    native.CPU.require().attention(
        _layout(query),
        _layout(key),
        _layout(value),
        given,
        mask is not None and mask.dtype != torch.bool,
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        slopes_stride,
        scale,
        softcap or 0.0,
        window or 0,
        causal,
        _layout(output),
        0 if lse is None else lse.data_ptr(),
        native.num_threads(),
    )
    return output, lse
