"""Attention as loops over single numbers, sharing nothing with the library: what every implementation is held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    top_left: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """float64 [B, H, Tq, Dv] of the arguments of `fastlm.ops.attention`."""
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys).tolist()
    slopes = None if alibi_slopes is None else alibi_slopes.double().expand(batch, heads).tolist()
    q, k, v = (t.detach().double().tolist() for t in (query, key, value))
    output = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            shared = h * kv_heads // heads
            for i in range(queries):
                here = i if top_left else keys - queries + i
                scores = {}
                for j in range(keys):
                    if (causal and j > here) or (window is not None and here - j >= window):
                        continue
                    score = scale * sum(x * y for x, y in zip(q[b][h][i], k[b][shared][j], strict=True))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if slopes is not None:
                        score -= slopes[b][h] * (here - j)
                    if mask is not None:
                        if mask[b][h][i][j] is False or mask[b][h][i][j] == -math.inf:
                            continue
                        score += 0.0 if mask[b][h][i][j] is True else mask[b][h][i][j]
                    scores[j] = score
                total = sum(math.exp(score) for score in scores.values())
                total += 0.0 if sinks is None else math.exp(sinks[h])
                for d in range(value.shape[3]):
                    weighted = sum(math.exp(score) * v[b][shared][j][d] for j, score in scores.items())
                    output[b, h, i, d] = weighted / total if scores else 0.0
    return output
