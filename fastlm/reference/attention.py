"""Scaled dot-product attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762) with the usual options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Options",
    "Packing",
    "alibi_bias",
    "attention",
    "attention_lse",
    "attention_varlen",
    "sequences",
    "visible_keys",
]


class Packing(NamedTuple):
    """Where sequences that lie one behind another begin, int [B + 1] each, and bounds of their lengths."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


class Options(NamedTuple):
    """The options of attention in the order in which implementations take them: see `fastlm.ops.attention`."""

    causal: bool
    mask: Tensor | None
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    top_left: bool = False
    sinks: Tensor | None = None
    # Of kernels alone, which the public functions give them:
    seed: Tensor | None = None
    packing: Packing | None = None


def _distance(queries: int, keys: int, device: torch.device, top_left: bool) -> Tensor:
    """[Tq, Tk]: key position minus query position. The last query stands at the last key, or the first at the first."""
    shift = 0 if top_left else keys - queries
    query_positions = torch.arange(shift, shift + queries, device=device)
    return torch.arange(keys, device=device) - query_positions[:, None]


def visible_keys(
    queries: int, keys: int, causal: bool, window: int | None, device: torch.device, top_left: bool = False
) -> Tensor | None:
    """Bool [Tq, Tk], True where causality and the window let the query see the key; None where all is visible."""
    if not causal and window is None:
        return None
    distance = _distance(queries, keys, device, top_left)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if window is not None:
        visible &= distance > -window
    return visible


def alibi_bias(slopes: Tensor, queries: int, keys: int, dtype: torch.dtype, top_left: bool = False) -> Tensor:
    """[1 or B, H, Tq, Tk]: slope * (key position - query position), slopes [H] or [B, H].

    Press et al., 2021, https://arxiv.org/abs/2108.12409.
    """
    distance = _distance(queries, keys, slopes.device, top_left).to(dtype)
    return slopes.to(dtype).reshape(-1, slopes.shape[-1], 1, 1) * distance


def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    top_left: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(bias + cap(scale * Q K^T)) V in float32 or wider, and the log [B, H, Tq] of each softmax's denominator.

    A query that sees no key gives 0. A sink [H] is one more score of each query, of a key whose value is 0.
    """
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
        scores = scores + alibi_bias(alibi_slopes, queries, keys, wide, top_left)
    visible = visible_keys(queries, keys, causal, window, query.device, top_left)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat((scores, sink), dim=-1), functional.pad(v, (0, 0, 0, 1))

    # The softmax of a row of -inf is NaN, and so is its gradient: such rows are computed on zeros, then dropped.
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind[..., 0], -torch.inf)
    return (functional.dropout(weights, dropout_p) @ v).to(query.dtype), lse


def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
    """The output of `attention_lse`, whose arguments these are."""
    return attention_lse(query, key, value, *options, **named)[0]


def sequences(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, o: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]]:
    """The arguments of `attention` for each sequence: [sum of T, H, D] to [1, H, T, D] of each, and its options."""
    starts_q, starts_k = packing.starts_q.tolist(), packing.starts_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, columns = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        slopes = o.alibi_slopes if o.alibi_slopes is None or o.alibi_slopes.dim() == 1 else o.alibi_slopes[b]
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[columns], value[columns]))
        yield q, k, v, o._replace(alibi_slopes=slopes)[:9]


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, *options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_lse` of each sequence by itself: the output [sum of Tq, H, Dv], the log-sum-exp [H, sum of Tq]."""
    found = [attention_lse(q, k, v, *o) for q, k, v, o in sequences(query, key, value, packing, Options(*options))]
    return torch.cat([o[0].transpose(0, 1) for o, _ in found]), torch.cat([lse[0] for _, lse in found], dim=1)
