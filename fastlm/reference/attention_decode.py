"""Attention of new tokens to a key-value cache whose rows hold sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference.attention import attention
from fastlm.reference.kv_cache import kv_read

__all__ = ["attention_decode", "attention_paged"]


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
        key, value = (kv_read(cache[row, :, :length], query.dtype) for cache in (key_cache, value_cache))
        outputs.append(
            attention(
                query[b : b + 1], key[None], value[None], True, None, scale, window, softcap, slopes, dropout_p=0.0
            )
        )
    return torch.cat(outputs) if batch else torch.empty_like(query)


def attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """As `attention_decode` of caches in which position s of batch entry b is place s % page of page
    block_table[b, s // page], times the head's scale.
    """
    tokens, size = query.shape[2], key_pages.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        if not tokens <= length <= block_table.shape[1] * size:
            raise ValueError(
                f"attention_paged: lengths[{b}] is {length}, expected from {tokens} (new tokens, counted in) to "
                f"{block_table.shape[1] * size} ({block_table.shape[1]} pages of {size})"
            )
        table = block_table[b, : -(-length // size)]
        if len(table) and not 0 <= int(table.min()) <= int(table.max()) < len(key_pages):
            raise ValueError(
                f"attention_paged: block_table[{b}] is {table.tolist()}, expected 0 to {len(key_pages) - 1}"
            )
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        key, value = (
            _gather(pages, table, length, wide, factor)
            for pages, factor in ((key_pages, key_scale), (value_pages, value_scale))
        )
        outputs.append(
            attention(query[b : b + 1], key, value, True, None, scale, window, softcap, slopes, dropout_p=0.0)
        )
    return torch.cat(outputs) if outputs else torch.empty_like(query)


def _gather(pages: Tensor, table: Tensor, length: int, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    """[1, KVH, length, D], the first `length` positions of the pages in `table`, times each head's factor."""
    row = kv_read(pages[table].transpose(0, 1).flatten(1, 2)[None, :, :length], dtype)
    return row if factor is None else row * factor.to(dtype)[:, None, None]
