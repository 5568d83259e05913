"""Tables of cosines and sines for rotary position embedding, with the usual context-extending scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm import ops

__all__ = ["Rotary"]


class Rotary(torch.nn.Module):
    """Rotary position embedding: `cos, sin = rotary.tables(positions)`, then `rotary(query, cos, sin)`.

    Pair i turns by position * base^(-2i / rotary_dim) radians (Su et al., 2021, https://arxiv.org/abs/2104.09864).
    Holds no parameters and nothing in its state_dict.

    Args:
        rotary_dim: features rotated per head, even.
        base: sets the slowest pair's wavelength, 2 pi base.
        interleaved: pairs are (2i, 2i + 1); if False, (i, i + rotary_dim / 2).
        scaling: as `rope_scaling` in transformers' config files: None, or a mapping whose "rope_type" (or "type") is
            "default", "linear" (all angles divided by "factor"; https://arxiv.org/abs/2306.15595) or "llama3" (only
            wavelengths long against "original_max_position_embeddings" are stretched by "factor", in between blended
            by "low_freq_factor" and "high_freq_factor"; https://arxiv.org/abs/2407.21783).

    Raises:
        ValueError: `rotary_dim` is odd; `scaling` is of an unknown type or lacks a key.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if rotary_dim < 0 or rotary_dim % 2:
            raise ValueError(f"Rotary: rotary_dim is {rotary_dim}, expected an even number")
        self.rotary_dim = rotary_dim
        self.base = base
        self.interleaved = interleaved
        # In float32, operation by operation as transformers computes them: long contexts amplify the last bit.
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
        # Not a buffer, which `module.to(torch.bfloat16)` would round, and the meta device would empty.
        self.frequencies = _scaled(1.0 / (base**exponents), dict(scaling or {}))
        self._table: tuple[Tensor, Tensor] | None = None

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each float32 [..., rotary_dim / 2], of integer positions [...] ([T] or [B, T])."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions.to(torch.float32)[..., None] * self.frequencies
        return angles.cos(), angles.sin()

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`tables` of the positions from 0 to at least `length` - 1, kept from call to call."""
        if self._table is None or len(self._table[0]) < length or self._table[0].device != device:
            # Twice as long as the last one, lest a growing length makes a new table at each call.
            held = 0 if self._table is None else len(self._table[0])
            self._table = self.tables(torch.arange(max(length, 2 * held), device=device))
        return self._table

    def forward(self, input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates input [B, H, T, D] by tables [T, rotary_dim / 2] or [B, T, rotary_dim / 2]."""
        return ops.rotary(input, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, base={self.base}, interleaved={self.interleaved}"


def _scaled(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind not in ("linear", "llama3"):
        raise ValueError(f"Rotary: scaling has rope_type {kind!r}, expected default, linear or llama3")
    try:
        factor = float(scaling["factor"])
        if kind == "linear":
            return frequencies / factor
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        context = float(scaling["original_max_position_embeddings"])
    except KeyError as missing:
        raise ValueError(f"Rotary: scaling of rope_type {kind!r} lacks {missing}") from None
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies
