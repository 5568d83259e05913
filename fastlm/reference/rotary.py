"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary"]


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None = None) -> Tensor:
    """Rotates the pairs (x, y) of each head by their position's angles: (x cos - y sin, y cos + x sin).

    With starts [B], token t of sequence b takes row starts[b] + t of the tables.
    """
    if starts is not None:
        places = starts[:, None] + torch.arange(input.shape[-2], device=starts.device)
        cos, sin = cos[places], sin[places]
    rotated = 2 * cos.shape[-1]
    wide = torch.promote_types(input.dtype, torch.float32)
    c, s = (t.to(wide).unsqueeze(-3) for t in (cos, sin))  # one table for all heads
    head = input[..., :rotated].to(wide)
    if interleaved:  # pairs are (0, 1), (2, 3), ...
        x, y = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((x * c - y * s, y * c + x * s), dim=-1).flatten(-2)
    else:  # pairs are (i, i + R / 2)
        x, y = head.chunk(2, dim=-1)
        turned = torch.cat((x * c - y * s, y * c + x * s), dim=-1)
    turned = turned.to(input.dtype)
    return turned if rotated == input.shape[-1] else torch.cat((turned, input[..., rotated:]), dim=-1)
