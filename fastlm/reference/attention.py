"""Scaled dot-product attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762) with the usual options."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["alibi_bias", "attention", "visible_keys"]


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """[Tq, Tk]: key position minus query position. The last query stands at the last key ("bottom-right")."""
    query_positions = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) - query_positions[:, None]


def visible_keys(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [Tq, Tk], True where causality and the window let the query see the key; None where all is visible."""
    if not causal and window is None:
        return None
    distance = _distance(queries, keys, device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if window is not None:
        visible &= distance > -window
    return visible


def alibi_bias(slopes: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """[1 or B, H, Tq, Tk]: slope * (key position - query position), slopes [H] or [B, H].

    Press et al., 2021, https://arxiv.org/abs/2108.12409.
    """
    distance = _distance(queries, keys, slopes.device).to(dtype)
    return slopes.to(dtype).reshape(-1, slopes.shape[-1], 1, 1) * distance


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
    dropout_p: float,
) -> Tensor:
    """softmax(bias + cap(scale * Q K^T)) V in float32 or wider. A query that sees no key gives 0."""
    heads, queries = query.shape[1:3]
    kv_heads, keys = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Query head h reads key/value head h // (H / KVH).
    k = key.to(wide).repeat_interleave(heads // kv_heads, dim=1)
    v = value.to(wide).repeat_interleave(heads // kv_heads, dim=1)

    scores = scale * query.to(wide) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, queries, keys, wide)
    visible = visible_keys(queries, keys, causal, window, query.device)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)

    # The softmax of a row of -inf is NaN, and so is its gradient: such rows are computed on zeros, then dropped.
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (functional.dropout(weights, dropout_p) @ v).to(query.dtype)
