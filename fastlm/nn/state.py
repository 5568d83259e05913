"""What a model remembers of the tokens it has read: a KV cache for attention, hidden states for recurrence.

Both have rows, one per sequence, each with its own length, so that ragged batches need no padding; `row(i)` is a view
that shares memory, so that one row can be prefilled alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.reference.kv_cache import kv_read, kv_width
from fastlm.reference.linear import FEW_TOKENS

__all__ = ["KVCache", "KVStep", "RecurrentState", "Rows"]

Rows: TypeAlias = Sequence[int] | Tensor | None
"""Which rows of a state a batch's entries belong to: distinct indices, or None for all of them in order."""


def _row_list(rows: Rows, available: int) -> list[int]:
    if rows is None:
        return list(range(available))
    found: list[int] = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if any(not 0 <= row < available for row in found) or len(set(found)) != len(found):
        raise ValueError(f"rows: {found}, expected distinct indices from 0 to {available - 1}")
    return found


def _row_index(rows: Rows, available: int, device: torch.device) -> Tensor:
    """The rows as a contiguous int64 tensor: the very one given, where it is that."""
    if isinstance(rows, Tensor):
        if not native.values_unknown():
            _row_list(rows, available)
        return rows.to(device, torch.int64).contiguous()
    return torch.tensor(_row_list(rows, available), dtype=torch.int64, device=device)


def _advance(lengths: Tensor, count: int, rows: Rows) -> None:
    index = None if rows is None else _row_index(rows, len(lengths), lengths.device)
    ops.offset(lengths, count, out=lengths, source_index=index, out_index=index)


class KVCache:
    """Keys and values of the tokens read so far, preallocated.

    Attributes:
        keys, values: per layer [rows, kv_heads, max_length, head_dim], for int8 head_dim + 4 (`ops.kv_append`); what
            lies beyond a row's length is undefined.
        lengths: int64 [rows] on the same device, tokens stored in each row.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.lengths = lengths
        self.max_length: int = keys[0].shape[2]

    @classmethod
    def allocate(
        cls,
        rows: int,
        max_length: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache. The memory is not touched before it is used, so a long `max_length` costs nothing at first.

        Raises:
            ValueError: `rows` or `max_length` is not positive.
        """
        if rows < 1 or max_length < 1:
            raise ValueError(f"KVCache: rows={rows}, max_length={max_length}, expected both to be positive")
        shape = (rows, num_kv_heads, max_length, kv_width(head_dim, dtype))
        keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        return cls(keys, values, torch.zeros(rows, dtype=torch.int64, device=device))

    @property
    def rows(self) -> int:
        """How many sequences it holds."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def row(self, index: int) -> KVCache:
        """A cache of one row that shares memory with this one, length included."""
        if not 0 <= index < self.rows:
            raise ValueError(f"row: {index}, expected 0 to {self.rows - 1}")
        one = slice(index, index + 1)
        return KVCache([k[one] for k in self.keys], [v[one] for v in self.values], self.lengths[one])

    def reset(self, rows: Rows = None) -> None:
        """Forgets what the rows hold."""
        self.lengths[slice(None) if rows is None else _row_list(rows, self.rows)] = 0

    def step(self, batch: int, count: int, rows: Rows = None) -> KVStep:
        """The places of the next `count` tokens of `batch` rows, worked out once for all layers.

        Raises:
            ValueError: `rows` does not name `batch` distinct rows, or one of them would outgrow `max_length`.
        """
        return KVStep(self, batch, count, rows)

    def append(self, layer: int, key: Tensor, value: Tensor, rows: Rows = None) -> None:
        """Writes key and value [batch, kv_heads, count, head_dim] behind the rows' tokens; lengths stay.

        Raises as `step`.
        """
        self.step(key.shape[0], key.shape[2], rows).append(layer, key, value)

    def advance(self, count: int, rows: Rows = None) -> None:
        """Makes the `count` tokens last appended to each row part of it."""
        _advance(self.lengths, count, rows)

    def snapshot(self) -> Callable[[], None]:
        """A function that forgets every token appended after this call."""
        lengths = self.lengths.clone()

        def restore() -> None:
            self.lengths.copy_(lengths)

        return restore


class KVStep:
    """One forward pass over a cache: where its new tokens go and what they see.

    Attributes:
        rows: the row of each batch entry; while a device records, which rows they are is not known here.
        count: new tokens per entry.
        starts, lengths: int64 [batch] on the cache's device, each entry's length without and with the new tokens. They
            are computed by ops from `cache.lengths`, so a recorded step reads them anew each time.
    """

    __slots__ = ("_index", "_start", "cache", "count", "lengths", "rows", "starts")

    def __init__(self, cache: KVCache, batch: int, count: int, rows: Rows) -> None:
        self.cache = cache
        self.count = count
        # A recording serves other rows later, which only an index in memory can tell it.
        if native.values_unknown():
            self.rows, everyone, self._start = list(range(batch)), rows is None, None
        else:
            starts = self._check(batch, rows)
            everyone = self.rows == list(range(cache.rows)) and (rows is None or not native.recording())
            # Where equally long rows get many tokens, plain attention to a slice of the cache serves.
            self._start = starts[0] if len(set(starts)) == 1 and (everyone or batch == 1) else None
        device = cache.lengths.device
        self._index = index = None if everyone else _row_index(rows, cache.rows, device)
        self.starts, self.lengths = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(2))
        ops.offset(cache.lengths, out=self.starts, source_index=index)
        ops.offset(cache.lengths, count, out=self.lengths, source_index=index)

    def _check(self, batch: int, rows: Rows) -> list[int]:
        """Sets `rows`; returns the lengths of these rows."""
        cache, count = self.cache, self.count
        self.rows = _row_list(rows, cache.rows)
        if len(self.rows) != batch:
            raise ValueError(f"rows: {len(self.rows)} of the state's {cache.rows} rows for a batch of {batch}")
        every: list[int] = cache.lengths.tolist()
        starts = [every[row] for row in self.rows]
        for row, start in zip(self.rows, starts, strict=True):
            if start + count > cache.max_length:
                raise ValueError(
                    f"state: row {row} holds {start} tokens; {count} more exceed its max_length of {cache.max_length}"
                )
        return starts

    def positions(self) -> Tensor:
        """Where the new tokens stand: int64 [batch, count]."""
        if len(self.rows) == 1 and self.count <= FEW_TOKENS:
            places = self.starts.new_empty(1, self.count)
            for t in range(self.count):
                ops.offset(self.starts, t, out=places[0, t : t + 1])
            return places
        if self.count == 1:
            return self.starts[:, None]
        return self.starts[:, None] + torch.arange(self.count, device=self.starts.device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes key and value [batch, kv_heads, count, head_dim] into their places."""
        ops.kv_append(self.cache.keys[layer], self.cache.values[layer], key, value, self.starts, rows=self._index)

    def attend(self, layer: int, query: Tensor, window: int | None = None) -> Tensor:
        """Causal attention of query [batch, heads, count, head_dim] over the layer's keys, new ones included."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        # Few tokens go to the kernel for one, whose results do not depend on how many they are: tokens guessed ahead
        # are then judged by the very numbers that they would have had one by one.
        if self.count > FEW_TOKENS and self._start is not None:
            rows = slice(None) if self._index is None else slice(self.rows[0], self.rows[0] + 1)
            end = self._start + self.count
            key, value = (kv_read(t[rows, :, :end], query.dtype) for t in (keys, values))
            return ops.attention(query, key, value, causal=True, window=window)
        return ops.attention_decode(query, keys, values, self.lengths, rows=self._index, window=window)


class RecurrentState:
    """Hidden states (and the LSTM's cell states) after the tokens read so far; grows with nothing.

    Attributes:
        h: per layer [rows, size].
        c: per layer [rows, size], or None for cells without one.
        lengths: int64 [rows] on the same device, tokens read by each row.
    """

    max_length: int | None = None

    def __init__(self, h: list[Tensor], c: list[Tensor] | None, lengths: Tensor) -> None:
        self.h = h
        self.c = c
        self.lengths = lengths

    @classmethod
    def allocate(
        cls,
        rows: int,
        sizes: Sequence[int],
        *,
        cells: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RecurrentState:
        """The zero state for layers of these sizes, with cell states where `cells`. ValueError: `rows` < 1."""
        if rows < 1:
            raise ValueError(f"RecurrentState: rows={rows}, expected a positive number")

        def zeros() -> list[Tensor]:
            return [torch.zeros(rows, size, dtype=dtype, device=device) for size in sizes]

        return cls(zeros(), zeros() if cells else None, torch.zeros(rows, dtype=torch.int64, device=device))

    @property
    def rows(self) -> int:
        """How many sequences it holds."""
        return self.lengths.shape[0]

    def row(self, index: int) -> RecurrentState:
        """A state of one row that shares memory with this one, length included."""
        if not 0 <= index < self.rows:
            raise ValueError(f"row: {index}, expected 0 to {self.rows - 1}")
        one = slice(index, index + 1)
        c = None if self.c is None else [t[one] for t in self.c]
        return RecurrentState([t[one] for t in self.h], c, self.lengths[one])

    def reset(self, rows: Rows = None) -> None:
        """Sets the rows to the zero state."""
        index = slice(None) if rows is None else _row_list(rows, self.rows)
        for tensor in (*self.h, *(self.c or ()), self.lengths):
            tensor[index] = 0

    def read(self, layer: int, rows: Rows = None) -> tuple[Tensor, Tensor | None]:
        """The layer's h and c [batch, size]: copies where autograd records, since `write` changes them in place."""
        if rows is not None:
            index = _row_index(rows, self.rows, self.h[layer].device)
            h, c = self.h[layer], None if self.c is None else self.c[layer]
            return h.index_select(0, index), None if c is None else c.index_select(0, index)
        h, c = self.h[layer], None if self.c is None else self.c[layer]
        if torch.is_grad_enabled():
            return h.clone(), None if c is None else c.clone()
        return h, c

    @torch.no_grad()
    def write(self, layer: int, h: Tensor, c: Tensor | None, rows: Rows = None) -> None:
        """Replaces the layer's h and c; no gradient flows through the state (truncated backpropagation)."""
        index = None if rows is None else _row_index(rows, self.rows, self.h[layer].device)
        for held, new in ((self.h[layer], h), (None if self.c is None else self.c[layer], c)):
            if held is None or new is None:
                continue
            if index is None:
                held.copy_(new)
            else:
                held.index_copy_(0, index, new.to(held.dtype))

    def advance(self, count: int, rows: Rows = None) -> None:
        """Counts `count` more tokens as read by each row."""
        _advance(self.lengths, count, rows)

    def snapshot(self) -> Callable[[], None]:
        """A function that brings the state back to what it is now."""
        tensors = (*self.h, *(self.c or ()), self.lengths)
        copies = [tensor.clone() for tensor in tensors]

        def restore() -> None:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

        return restore
