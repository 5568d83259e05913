"""The weight formats of GGUF files: plain floats, and blocks of 32 small integers with a scale.

A row of K weights is K / 32 blocks back to back (ggml's `block_q8_0`, `block_q4_0`, `block_q4_1`; little-endian):

    Q8_0  half d, int8 q[32]              w = d * q
    Q4_0  half d, uint8 nibbles[16]       w = d * (q - 8)
    Q4_1  half d, half m, uint8 [16]      w = d * q + m

Byte j of the nibbles holds element j in its low half and element j + 16 in its high half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "Kind", "dequantize", "from_planes", "planes", "quantize", "to_planes"]


@dataclass(frozen=True)
class Kind:
    """A weight format: `block_bytes` bytes hold `block` weights. `code`: its number in csrc/include/fastlm/linear.h."""

    name: str
    code: int
    block: int
    block_bytes: int
    dtype: torch.dtype | None = None
    """For formats of plain floats."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights. Raises ValueError where it is not a whole number of blocks."""
        if columns % self.block:
            raise ValueError(
                f"{self.name} holds blocks of {self.block}, and {columns} columns are not a multiple of it"
            )
        return columns // self.block * self.block_bytes


KINDS = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, 1, 4, torch.float32),
        Kind("F16", 1, 1, 2, torch.float16),
        Kind("BF16", 2, 1, 2, torch.bfloat16),
        Kind("Q8_0", 3, 32, 34),
        Kind("Q4_0", 4, 32, 18),
        Kind("Q4_1", 5, 32, 20),
    )
}


def dequantize(data: Tensor, kind: str) -> Tensor:
    """uint8 [..., row_bytes] to float32 [..., K]. F32 data is returned as a view of itself."""
    layout = KINDS[kind]
    if data.shape[-1] == 0:
        return data.float()
    if layout.dtype is not None:
        return data.view(layout.dtype).float()
    blocks = data.unflatten(-1, (data.shape[-1] // layout.block_bytes, layout.block_bytes))
    scale = _half(blocks[..., 0:2])
    if kind == "Q8_0":
        weights = scale * blocks[..., 2:].view(torch.int8).float()
    elif kind == "Q4_0":
        weights = scale * (_nibbles(blocks[..., 2:]) - 8.0)
    else:
        weights = scale * _nibbles(blocks[..., 4:]) + _half(blocks[..., 2:4])
    return weights.flatten(-2)


def quantize(weights: Tensor, kind: str) -> Tensor:
    """float [..., K] to uint8 [..., row_bytes], to the same bytes as the `gguf` library and ggml's reference.

    Raises:
        ValueError: K is not a multiple of the format's block.
    """
    layout = KINDS[kind]
    layout.row_bytes(weights.shape[-1])
    weights = weights.detach().float().contiguous()
    if weights.numel() == 0:
        return weights.new_empty(*weights.shape[:-1], layout.row_bytes(weights.shape[-1]), dtype=torch.uint8)
    if kind == "BF16":
        return _bfloat16_bytes(weights)
    if layout.dtype is not None:
        return weights.to(layout.dtype).view(torch.uint8)
    blocks = weights.unflatten(-1, (weights.shape[-1] // layout.block, layout.block))
    if kind == "Q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _reciprocal(scale)
        size = scaled.abs().floor()
        codes = scaled.sign() * (size + (2 * (scaled.abs() - size)).floor())  # halves round away from zero
        parts = [_half_bytes(scale), codes.to(torch.int8).view(torch.uint8)]
    elif kind == "Q4_0":
        # The element of largest magnitude, with its sign, becomes -8: the end of the range that has one step more.
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        parts = [_half_bytes(scale), _pack(blocks * _reciprocal(scale) + 8.5)]
    else:
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / 15
        parts = [_half_bytes(scale), _half_bytes(low), _pack((blocks - low) * _reciprocal(scale) + 0.5)]
    return torch.cat(parts, dim=-1).flatten(-2)


def to_planes(data: Tensor, kind: str) -> Tensor:
    """The bytes of a matrix of blocks, uint8 [N, row_bytes], part by part, in a tensor of the same shape: all codes
    [K / 32, N, ...], then all scales [K / 32, N], then, of Q4_1, all minima. What GPUs read in wide loads.
    """
    blocks = data.unflatten(-1, (-1, KINDS[kind].block_bytes)).transpose(0, 1)  # [K / 32, N, block_bytes]
    head = _head(kind)
    parts = [blocks[..., head:], *(blocks[..., i : i + 2] for i in range(0, head, 2))]
    return torch.cat([part.reshape(-1) for part in parts]).view(data.shape)


def planes(data: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of what `to_planes` made: codes uint8 [K / 32, N, 16 or 32], scales and minima float16 [K / 32, N]."""
    rows, size, head = len(data), KINDS[kind].block_bytes, _head(kind)
    count = data.shape[1] // size
    flat = data.view(-1)
    codes, *halves = flat.split([count * rows * (size - head), *[count * rows * 2] * (head // 2)])
    scales = [half.view(torch.float16).view(count, rows) for half in halves]
    return codes.view(count, rows, size - head), scales[0], scales[1] if len(scales) > 1 else None


def from_planes(data: Tensor, kind: str) -> Tensor:
    """The inverse of `to_planes`."""
    codes, *halves = (part for part in planes(data, kind) if part is not None)
    parts = [*(half[..., None].view(torch.uint8) for half in halves), codes]
    return torch.cat(parts, dim=-1).transpose(0, 1).reshape(data.shape)


def _head(kind: str) -> int:
    """Bytes of a block before its codes."""
    return 4 if kind == "Q4_1" else 2


def _half(pair: Tensor) -> Tensor:
    return pair.contiguous().view(torch.float16).float()


def _half_bytes(scale: Tensor) -> Tensor:
    return scale.half().view(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1).float()


def _pack(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).clamp(0, 15).chunk(2, dim=-1)  # the conversion truncates
    return low | (high << 4)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _bfloat16_bytes(weights: Tensor) -> Tensor:
    bits = weights.view(torch.int32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    bits = torch.where(nan, (bits & -65536) | (64 << 16), bits)  # quiet, keeping sign and payload as ggml does
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).to(torch.int16).view(torch.uint8)
