"""Weights rearranged for the native kernels, and a cache of them.

A kernel reads its weights in an order of its own ("packed", see csrc/cpu/gemm_panel.h). Packing costs about as much as
one pass over the weights, so it is done once per version of a weight: `cached` remembers the result for as long as
the tensors it came from live unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["cached", "clear", "pack"]

T = TypeVar("T")


def pack(matrix: Tensor, *, gates: bool = False) -> Tensor:
    """Packs a float32 matrix [k, n] of any strides for products `rows[.., k] @ matrix`.

    Args:
        matrix: [k, n]; pass `weight.t()` for a torch-style weight [n, k].
        gates: n is four gates of n / 4 units each, and a panel takes the same units of all four.

    Returns:
        float32, one dimension, in the layout of the active instruction-set level.
    """
    module = native.CPU.require()
    k, n = matrix.shape
    packed = torch.empty(module.packed_size(k, n, gates), dtype=torch.float32)
    stride_k, stride_n = matrix.stride()
    module.pack_panels(matrix.data_ptr(), k, n, stride_k, stride_n, gates, packed.data_ptr(), native.num_threads())
    return packed


class _Entry(NamedTuple):
    references: tuple[weakref.ref[Tensor] | None, ...]
    stamp: Hashable
    value: Any


_entries: dict[Hashable, _Entry] = {}


def _stamp(sources: Sequence[Tensor | None]) -> Hashable:
    """What is different after a change: versions (in-place operations, optimizers, `load_state_dict`), addresses
    (`.data = ...`), and a hash of a few values of each, since a write through `.data` leaves no other trace."""
    marks: list[int] = [native.CPU.require().simd_lanes()]
    spans: list[tuple[int, int]] = []
    for source in sources:
        if source is not None:
            address = source.data_ptr()
            marks += (source._version, address)
            if source.is_contiguous():
                spans.append((address, source.numel()))
    marks.append(native.CPU.require().sample_hash(spans))
    return tuple(marks)


def cached(kind: str, sources: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """`make()`, or what it returned the last time for these very tensors if none has changed since.

    Never stale after in-place operations, optimizer steps, `load_state_dict`, or `.data = other`. A write through
    `.data` in place (`p.data.mul_(2)`) goes unrecorded by torch; it is noticed by a sample of the values, which a
    change to a few elements alone can escape: call `clear` after such surgery, or write under `torch.no_grad()`.

    Nothing is kept for inference tensors (they record no version). Entries go when a source tensor goes. Safe to call
    from several threads: at worst each packs for itself.

    Args:
        kind: what is made of the sources; part of the key.
        sources: float32 CPU tensors; the first is not None.
    """
    if any(source is not None and source.is_inference() for source in sources):
        return make()
    key = (kind, id(sources[0]))
    stamp = _stamp(sources)
    entry = _entries.get(key)
    if (
        entry is not None
        and entry.stamp == stamp
        and all(
            (reference is None and source is None) or (reference is not None and reference() is source)
            for reference, source in zip(entry.references, sources, strict=True)
        )
    ):
        value: T = entry.value
        return value
    value = make()

    def forget(reference: weakref.ref[Tensor]) -> None:
        found = _entries.get(key)
        if found is not None and any(reference is other for other in found.references):
            _entries.pop(key, None)

    references = tuple(None if source is None else weakref.ref(source, forget) for source in sources)
    _entries[key] = _Entry(references, stamp, value)
    return value


def clear() -> None:
    """Forgets every packed weight."""
    _entries.clear()
