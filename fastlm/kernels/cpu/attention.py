"""Native attention: csrc/cpu/attention.cpp and attention_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["attention", "attention_backward"]


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _layout(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class _Arguments:
    """The kernels' common arguments, and the tensors they point to."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor | None,
        causal: bool,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        alibi_slopes: Tensor | None,
    ) -> None:
        batch, heads, queries, _ = query.shape
        query, key, value = _rows(query), _rows(key), _rows(value)
        layout = None
        additive = mask is not None and mask.dtype != torch.bool
        if mask is not None:
            mask = mask.to(torch.float32) if additive else mask
            layout = mask.data_ptr(), mask.expand(batch, heads, queries, key.shape[2]).stride()
        slopes_stride = 0
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.to(torch.float32).contiguous()
            slopes_stride = heads if alibi_slopes.dim() == 2 else 0
        self.held = query, key, value, mask, alibi_slopes, output, lse
        self.native = (
            _layout(query),
            _layout(key),
            _layout(value),
            layout,
            additive,
            native.address(alibi_slopes),
            slopes_stride,
            scale,
            softcap or 0.0,
            window or 0,
            causal,
            _layout(output),
            native.address(lse),
            query.dtype is torch.bfloat16,
            native.num_threads(),
        )


def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, save: bool = False) -> tuple[Tensor, Tensor]:
    """The output [B, H, Tq, Dv], stored as [B, Tq, H, Dv], and with `save` the log-sum-exp [B, H, Tq] of the scores.

    `options` are causal, mask, scale, window, softcap and alibi_slopes as in `fastlm.ops.attention`. The tensors are
    float32 (the mask bool or floating) or, with neither mask nor slopes, all bfloat16, and not empty. Without `save`
    the second result is empty.
    """
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries) if save else 0, dtype=torch.float32)
    arguments = _Arguments(query, key, value, output, lse if save else None, *options)
    native.CPU.require().attention(*arguments.native)
    return output, lse


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *options: Any,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in `out` if given (each row's features contiguous); `output` and `lse` are
    what `attention(..., save=True)` returned."""
    batch, heads, queries, dim = query.shape
    grad_output = _rows(grad_output)
    if out is None:
        grad_query = query.new_empty(batch, queries, heads, dim).transpose(1, 2)
        out = grad_query, query.new_empty(key.shape), query.new_empty(value.shape)
    grad_query, grad_key, grad_value = out
    arguments = _Arguments(query, key, value, output, lse, *options)
    native.CPU.require().attention_backward(
        arguments.native, _layout(grad_output), _layout(grad_query), _layout(grad_key), _layout(grad_value)
    )
    return grad_query, grad_key, grad_value
