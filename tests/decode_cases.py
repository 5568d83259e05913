"""Calls of ops.attention_decode, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm.reference import attention_decode as reference

Decode = Callable[..., Tensor]


def make_case(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, lengths: list[int], positions: int, **options: Any
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """Random query, caches and lengths; what no row may read is NaN."""
    query = torch.randn(batch, heads, tokens, dim)
    keys, values = torch.randn(2, batch + 2, kv_heads, positions, dim)
    rows = torch.randperm(batch + 2)[:batch]
    stored = torch.zeros(batch + 2, positions, dtype=torch.bool)
    for row, length in zip(rows.tolist(), lengths, strict=True):
        stored[row, :length] = True
    for cache in (keys, values):
        cache.masked_fill_(~stored[:, None, :, None], torch.nan)
    return (query, keys, values, torch.tensor(lengths)), {"rows": rows, **options}


def exact(args: tuple[Tensor, ...], options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    query, keys, values, lengths = args
    o = {"rows": None, "scale": None, "window": None, "softcap": None, "alibi_slopes": None, **options}
    scale = query.shape[-1] ** -0.5 if o["scale"] is None else o["scale"]
    return reference.attention_decode(
        *(t.to(dtype) for t in (query, keys, values)),
        lengths,
        o["rows"],
        scale,
        o["window"],
        o["softcap"],
        o["alibi_slopes"],
    )


def compare(decode: Decode, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    single = exact(args, options, torch.float32)
    # The floor: at the baseline's four lanes a head of 256 is summed in chains of 64, BLAS's own are shorter.
    assert_close_to_reference(decode(*args, **options), single, exact(args, options), floor=3e-6)
