"""Attention over a whole sequence, and of one new token over a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.mark.parametrize("shape", [(9, 3, 256, 64), (9, 3, 1024, 64), (6, 6, 1024, 128)], ids=str)
def test_attention(race: Callable[..., None], shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, length, size = shape
    query = torch.randn(1, heads, length, size)
    key, value = (torch.randn(1, kv_heads, length, size) for _ in range(2))
    race("attention", query, key, value, causal=True)


@pytest.mark.parametrize("shape", [(1, 128), (1, 2048), (16, 2048)], ids=str)
def test_attention_decode(race: Callable[..., None], shape: tuple[int, int]) -> None:
    batch, context = shape
    keys, values = (torch.randn(batch, 3, context, 64) for _ in range(2))
    query, lengths = torch.randn(batch, 9, 1, 64), torch.full((batch,), context)
    race("attention_decode", query, keys, values, lengths, moved=keys.nbytes + values.nbytes)
