"""Writing to a key-value cache, and the integers that say where."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kv_append", "offset"]


def kv_append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None) -> None:
    """keys[rows[b], :, starts[b] + t] = key[b, :, t], and values likewise."""
    batch, _, tokens, _ = key.shape
    row = (torch.arange(batch, device=starts.device) if rows is None else rows)[:, None]
    place = starts[:, None] + torch.arange(tokens, device=starts.device)
    keys[row, :, place] = key.transpose(1, 2).to(keys.dtype)
    values[row, :, place] = value.transpose(1, 2).to(values.dtype)


def offset(
    source: Tensor, amount: int, target: Tensor, source_index: Tensor | None, target_index: Tensor | None
) -> None:
    """target[target_index] = source[source_index] + amount."""
    moved = (source if source_index is None else source[source_index]) + amount
    if target_index is None:
        target.copy_(moved)
    else:
        target[target_index] = moved.to(target.device)
