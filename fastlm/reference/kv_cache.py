"""What a key-value cache holds, writing to it, and the integers that say where.

A cache has the dtype of its keys and values, bfloat16, int8 or float8_e4m3fn. In int8 a key of D features takes D + 4
elements: the integers round(x / scale) of -127 to 127 and the four bytes of their float32 scale, which is the largest
magnitude / 127. In float8 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433) there is no scale, for each
number has an exponent of its own: they are rounded to 4 significant bits, to multiples of 2^-9 below 2^-6, and cut off
at 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KV_SCALE_BYTES", "kv_append", "kv_dtypes", "kv_read", "kv_width", "kv_written", "offset"]

KV_SCALE_BYTES = 4
_SMALLEST = 1e-30
"""A largest magnitude below it counts as 0, so that its reciprocal is finite."""


def kv_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What keys and values of this dtype may be kept in, their own first."""
    smaller = (torch.bfloat16,) if dtype is torch.float32 else ()
    return (dtype, *smaller, torch.int8, torch.float8_e4m3fn)


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a key or value of `head_dim` features takes in a cache of this dtype."""
    return head_dim + KV_SCALE_BYTES if dtype is torch.int8 else head_dim


def kv_read(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache [..., kv_width(D)] holds: [..., D]. A vector with a number that was not finite is NaN."""
    if cache.dtype is not torch.int8:
        return cache.to(dtype)
    scale = cache[..., -KV_SCALE_BYTES:].contiguous().view(torch.float32)
    return (cache[..., :-KV_SCALE_BYTES] * scale).to(dtype)


def kv_written(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., D] as a cache of this dtype holds it: [..., kv_width(D)]."""
    if dtype is torch.float8_e4m3fn:
        limit = torch.finfo(dtype).max
        return x.clamp(-limit, limit).to(dtype)  # torch's conversion alone makes NaN of what is larger
    if dtype is not torch.int8:
        return x.to(dtype)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    finite, tiny = torch.isfinite(largest), largest < _SMALLEST
    scale = torch.where(finite, torch.where(tiny, 0.0, largest / 127), torch.nan)
    inverse = torch.where(tiny | ~finite, 0.0, 127 / largest)
    integers = torch.where(finite, torch.round(x * inverse), 0.0).to(torch.int8)
    return torch.cat((integers, scale.view(torch.int8)), dim=-1)


def kv_append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, rows: Tensor | None) -> None:
    """keys[rows[b], :, starts[b] + t] = key[b, :, t], and values likewise."""
    batch, _, tokens, _ = key.shape
    row = (torch.arange(batch, device=starts.device) if rows is None else rows)[:, None]
    place = starts[:, None] + torch.arange(tokens, device=starts.device)
    for cache, new in ((keys, key), (values, value)):
        _stored(cache)[row, :, place] = _stored(kv_written(new, cache.dtype)).transpose(1, 2)


def _stored(tensor: Tensor) -> Tensor:
    """As bytes where it is float8, which not every device can index."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def offset(
    source: Tensor, amount: int, target: Tensor, source_index: Tensor | None, target_index: Tensor | None
) -> None:
    """target[target_index] = source[source_index] + amount."""
    moved = (source if source_index is None else source[source_index]) + amount
    if target_index is None:
        target.copy_(moved)
    else:
        target[target_index] = moved.to(target.device)
