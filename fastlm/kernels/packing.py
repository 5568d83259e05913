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

__all__ = ["cached", "clear", "digit_tiles", "find", "pack", "pack_digits", "remembered"]

T = TypeVar("T")


def pack(matrix: Tensor, *, gates: int = 0) -> Tensor:
    """Packs a float32 or bfloat16 matrix [k, n] of any strides for products `rows[.., k] @ matrix`.

    Args:
        matrix: [k, n]; pass `weight.t()` for a torch-style weight [n, k].
        gates: 3 or 4: n is that many gates of n / gates units each, and a panel takes the same units of all.

    Returns:
        the same dtype, one dimension, in the layout of the active instruction-set level.
    """
    module = native.CPU.require()
    k, n = matrix.shape
    bfloat = matrix.dtype is torch.bfloat16
    size = module.packed_size(k, n, gates, bfloat)
    packed = torch.empty(size, dtype=matrix.dtype) if bfloat else native.empty(size)
    stride_k, stride_n = matrix.stride()
    addresses = matrix.data_ptr(), k, n, stride_k, stride_n, gates, packed.data_ptr()
    module.pack_panels(*addresses, native.num_threads(), bfloat)
    return packed


def digit_tiles() -> bool:
    """Whether `pack_digits`, and the products for which it packs, run on this processor at the level in use."""
    return native.CPU.module is not None and bool(native.CPU.module.digit_tiles())


def pack_digits(matrix: Tensor, *, gates: int = 0, k_groups: int = 1) -> Tensor:
    """Packs a float32 matrix [k, n] of any strides as three digits a number (csrc/cpu/digits.h), or as parts (amx.h).

    Args:
        matrix, gates: as for `pack`.
        k_groups: k is that many groups of rows, of which each is filled up to a multiple of 16. 0: as three bfloat16
            parts a number, which keep the range of floats.
    """
    module = native.CPU.require()
    k, n = matrix.shape
    packed = native.empty(-(-module.packed_digits_size(k, n, gates, k_groups) // 4))
    module.pack_digits(
        matrix.data_ptr(), k, n, *matrix.stride(), gates, k_groups, packed.data_ptr(), native.num_threads()
    )
    return packed


class _Entry(NamedTuple):
    marks: list[Any]
    samples: Any
    references: tuple[weakref.ref[Tensor], ...]
    value: Any


# By the identities of the sources. Identity of a live tensor: an entry goes as soon as one of its sources does.
_entries: dict[Hashable, _Entry] = {}


def _marks(sources: Sequence[Tensor | None]) -> list[Any]:
    """What a change leaves behind: versions (in-place operations, optimizers, `load_state_dict`), and addresses and
    layouts (`.data = ...`)."""
    marks: list[Any] = []
    for source in sources:
        if source is not None:
            marks += (source._version, source.data_ptr(), source.shape, source.stride())
    return marks


def remembered(kind: str, sources: Sequence[Tensor | None]) -> Any | None:
    """What `cached` made of these very tensors, None if nothing. The caller looks whether they have changed since."""
    entry = _entries.get((kind, *map(id, sources)))
    return None if entry is None else entry.value


def find(kind: str, sources: Sequence[Tensor | None]) -> Any | None:
    """What `cached` remembers of these very tensors, None if that is nothing or they have changed since.

    Between two uses of a large weight everything else is out of the processor's caches, so what this touches is what it
    costs: one entry, the sources' headers, and the sampled values.
    """
    entry = _entries.get((kind, *map(id, sources)))
    # The samples last: their addresses are those of the sources only where the marks agree.
    if entry is not None and entry.marks == _marks(sources) and entry.samples.unchanged():
        return entry.value
    return None


def cached(kind: str, sources: Sequence[Tensor | None], make: Callable[..., T]) -> T:
    """`make(*sources)`, or what it returned the last time for these very tensors if none has changed since.

    Never stale after in-place operations, optimizer steps, `load_state_dict`, or `.data = other`. A write through
    `.data` in place (`p.data.mul_(2)`) goes unrecorded by torch; it is noticed by a sample of four values of each
    source, the first and the last among them, which a change to a few elements alone can escape: call `clear` after
    such surgery, or write under `torch.no_grad()`.

    Nothing is kept for inference tensors (they record no version). Entries go when a source tensor goes. Safe to call
    from several threads: at worst each packs for itself.

    Args:
        kind: what is made of the sources; part of the key.
        sources: float32 or bfloat16 CPU tensors, or None.
        make: returns anything but None.
    """
    found: T | None = find(kind, sources)
    if found is not None:
        return found
    present = [source for source in sources if source is not None]
    if any(source.is_inference() for source in present):
        return make(*sources)
    marks = _marks(sources)  # before packing, in case another thread changes a source meanwhile
    spans = [(source.data_ptr(), source.nbytes // 4) for source in present if source.is_contiguous()]
    samples = native.CPU.require().Samples(spans)
    key = (kind, *map(id, sources))
    _entries.pop(key, None)  # its memory, whose pages are in place, is then what `make` is given
    value = make(*sources)

    def forget(reference: weakref.ref[Tensor]) -> None:
        found = _entries.get(key)
        if found is not None and any(reference is other for other in found.references):
            _entries.pop(key, None)

    references = tuple(weakref.ref(source, forget) for source in present)
    _entries[key] = _Entry(marks, samples, references, value)
    return value


def clear() -> None:
    """Forgets every packed weight."""
    _entries.clear()
