"""Weights in GGUF's formats, read where they lie."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastlm.kernels import native
from fastlm.kernels.cpu import linear as kernel
from fastlm.ops.checks import describe
from fastlm.ops.library import tracing
from fastlm.reference.quantized import KINDS, dequantize, from_planes, planes, quantize, to_planes

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

__all__ = ["QuantizedTensor"]

_INTERLEAVING = threading.Lock()
_INTERLEAVED = WeakTensorKeyDictionary()
"""Of each weight's bytes the interleaved copies by number of lanes, whichever QuantizedTensor has wrapped them."""


class QuantizedTensor:
    """A frozen weight [N, K] in one of the formats of GGUF files.

    Args:
        data: uint8 [N, row_bytes], contiguous, not written to from then on. May be a read-only memory map. Embeddings
            and exact products read it in place, and its pages are shared between processes; integer products on a CPU
            (`ops.linear`) make and keep a copy in another order, of the same size, when they first meet it.
        kind: "F32", "F16", "BF16", "Q8_0", "Q4_0" or "Q4_1"; the layouts are in `fastlm.reference.quantized`.
        shape: (N, K). K is a multiple of 32 for the Q kinds.
        layout: "blocks", as in files, or "planes" (`fastlm.reference.quantized.to_planes`), as GPUs read them. `to`
            changes it.
        release: called once a copy for integer products has been made, when `data` will hardly be read any more.

    Raises:
        ValueError: the kind is unknown, K is not a whole number of blocks, or `data` does not fit.
    """

    __slots__ = ("_interleaved", "code", "data", "kind", "layout", "release", "row_bytes", "shape")

    requires_grad = False
    data: Tensor
    kind: str
    shape: torch.Size
    code: int
    row_bytes: int
    layout: str
    release: Callable[[], None] | None
    _interleaved: dict[int, Tensor]

    def __init__(
        self,
        data: Tensor,
        kind: str,
        shape: tuple[int, int],
        layout: str = "blocks",
        *,
        release: Callable[[], None] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"QuantizedTensor: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        if len(shape) != 2:
            raise ValueError(f"QuantizedTensor: shape is {tuple(shape)}, expected (rows, columns)")
        rows, columns = shape
        try:
            row_bytes = KINDS[kind].row_bytes(columns)
        except ValueError as error:
            raise ValueError(f"QuantizedTensor: {error}") from None
        if data.dtype != torch.uint8 or data.shape != (rows, row_bytes) or not data.is_contiguous():
            raise ValueError(
                f"QuantizedTensor: data is {describe(data)}{'' if data.is_contiguous() else ', not contiguous'}, "
                f"expected contiguous uint8 [{rows}, {row_bytes}] for {rows} rows of {columns} {kind} weights"
            )
        if layout not in ("blocks", "planes") or (layout == "planes" and KINDS[kind].dtype is not None):
            raise ValueError(f"QuantizedTensor: layout is {layout!r}, expected 'blocks', or 'planes' for Q kinds")
        self.data = data
        self.layout = layout
        self.kind = kind
        self.shape = torch.Size(shape)
        self.code = KINDS[kind].code
        self.row_bytes = row_bytes
        self.release = release
        self._interleaved = _INTERLEAVED.setdefault(data, {})

    @classmethod
    def from_numpy(cls, data: np.ndarray, kind: str, shape: tuple[int, int]) -> QuantizedTensor:
        """Wraps an array (np.memmap included) of N * row_bytes bytes, without a copy. It may be read-only."""
        with warnings.catch_warnings():
            # Writing through the tensor would be undefined; nothing here writes to a weight.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(data.reshape(-1).view("uint8"))
        rows = shape[0]
        return cls(flat.view(rows, -1) if rows and flat.numel() % rows == 0 else flat, kind, shape)

    @classmethod
    def quantize(cls, tensor: Tensor, kind: str) -> QuantizedTensor:
        """Rounds a float tensor [N, K] to `kind`, to the same bytes as ggml's reference.

        Raises:
            ValueError: the kind is unknown, or the shape does not fit it.
        """
        if kind not in KINDS:
            raise ValueError(f"QuantizedTensor.quantize: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"QuantizedTensor.quantize: tensor is {describe(tensor)}, expected floats [rows, columns]")
        try:
            return cls(quantize(tensor, kind), kind, (tensor.shape[0], tensor.shape[1]))
        except ValueError as error:
            raise ValueError(f"QuantizedTensor.quantize: {error}") from None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it as a new tensor [N, K] of its own memory."""
        return self.expand_rows(0, self.shape[0]).to(dtype)

    def expand_rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive) as a new float32 tensor [last - first, K]."""
        if self._native():
            output = torch.empty(last - first, self.shape[1], dtype=torch.float32, device=kernel.CPU)
            kernel.dequantize_rows(self.data, self.code, self.shape[0], output, first=first)
            return output
        weights = self._dequantize(slice(first, last))
        return weights.clone() if self.kind == "F32" else weights

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (integer [...]) as float32 [..., K]: an embedding lookup that touches those rows alone.

        Raises:
            ValueError: `ids` are not integers.
            IndexError: an id is not in [0, N) (checked on CPU: elsewhere looking at them would wait for the device).
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"QuantizedTensor.rows: ids are {describe(ids)}, expected integers")
        count, columns = self.shape
        if self._native() and ids.is_cpu:
            flat = ids.reshape(-1).to(torch.int64)
            output = torch.empty(flat.shape[0], columns, dtype=torch.float32, device=kernel.CPU)
            bad = kernel.dequantize_rows(self.data, self.code, count, output, ids=flat)
            if bad >= 0:
                raise IndexError(f"QuantizedTensor.rows: id {int(flat[bad])} is not in [0, {count})")
            return output.view(*ids.shape, columns)
        if ids.is_cpu and not tracing() and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            wrong = ids[(ids < 0) | (ids >= count)][0]
            raise IndexError(f"QuantizedTensor.rows: id {int(wrong)} is not in [0, {count})")
        return self._dequantize(ids.long())

    def interleaved(self) -> Tensor:
        """The bytes in the order in which the active instruction-set level's integer products read them.

        Made once and never moved or dropped: recorded programs hold its address.
        """
        lanes = native.CPU.require().simd_lanes()
        packed = self._interleaved.get(lanes)
        if packed is None:
            with _INTERLEAVING:
                packed = self._interleaved.get(lanes)
                if packed is None:
                    packed = kernel.interleave(self.data, self.code, self.shape[0], self.shape[1])
                    self._interleaved[lanes] = packed
                    if self.release is not None:
                        self.release()
        return packed

    def _native(self) -> bool:
        return native.CPU.module is not None and self.data.is_cpu and self.layout == "blocks" and not tracing()

    def _dequantize(self, rows: slice | Tensor) -> Tensor:
        if self.layout == "blocks":
            return dequantize(self.data[rows], self.kind)
        codes, *halves = (part for part in planes(self.data, self.kind) if part is not None)
        blocks = torch.cat([*(half[:, rows, None].view(torch.uint8) for half in halves), codes[:, rows]], dim=-1)
        return dequantize(blocks.movedim(0, -2).flatten(-2), self.kind)

    def relaid(self, layout: str) -> QuantizedTensor:
        """The same weight with its bytes in another order; itself where they are in it already."""
        if layout == self.layout:
            return self
        data = (to_planes if layout == "planes" else from_planes)(self.data, self.kind)
        return QuantizedTensor(data, self.kind, (self.shape[0], self.shape[1]), layout)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """On `device`, in the order that its kernels read; itself where it is there already."""
        moved = self.data.to(device)
        if moved is self.data:
            return self
        there = QuantizedTensor(moved, self.kind, (self.shape[0], self.shape[1]), self.layout)
        return there.relaid("planes" if not moved.is_cpu and KINDS[self.kind].dtype is None else "blocks")

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.data.device

    @property
    def is_cpu(self) -> bool:
        """Whether the bytes are in the CPU's memory."""
        return self.data.is_cpu

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is stored, and of the interleaved copy where there is one."""
        return self.data.numel() + sum(map(len, self._interleaved.values()))

    @property
    def to_gguf_kind(self) -> GGMLQuantizationType:
        """The kind as the `gguf` library's enumeration."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.kind]

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedTensor, (self.data, self.kind, (self.shape[0], self.shape[1]), self.layout)

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.kind}, shape={tuple(self.shape)}, device={self.data.device})"
