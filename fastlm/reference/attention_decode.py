"""Attention of new tokens to a key-value cache whose rows hold sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference.attention import attention

__all__ = ["attention_decode"]


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Causal attention of each batch entry's T queries to the first lengths[b] positions of cache row rows[b]."""
    batch, tokens = query.shape[0], query.shape[2]
    cache_rows, positions = key_cache.shape[0], key_cache.shape[2]
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        row = b if rows is None else int(rows[b])
        if not tokens <= length <= positions:
            raise ValueError(
                f"attention_decode: lengths[{b}] is {length}, expected from {tokens} (new tokens, counted in) to "
                f"{positions} (positions in the cache)"
            )
        if not 0 <= row < cache_rows:
            raise ValueError(f"attention_decode: rows[{b}] is {row}, expected 0 to {cache_rows - 1}")
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        key, value = (cache[row, :, :length].to(query.dtype) for cache in (key_cache, value_cache))
        outputs.append(
            attention(
                query[b : b + 1], key[None], value[None], True, None, scale, window, softcap, slopes, dropout_p=0.0
            )
        )
    return torch.cat(outputs) if batch else torch.empty_like(query)
