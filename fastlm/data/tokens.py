"""Token files, and the batches that training takes from them.

A token file is a JSON header followed by the ids as raw little-endian integers, read through the memory map: a corpus
larger than memory is encoded as a stream and trained on without being loaded.

Layout: 8 bytes `MAGIC`; a header of `HEADER` bytes in all (JSON, padded with spaces); `count` ids (uint16 or uint32);
`documents` starts of texts (uint64).
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm.data.errors import DataError
from fastlm.data.tokenizer import Tokenizer

__all__ = ["ContiguousBatch", "ContiguousBatches", "TokenFile", "encode_to_file", "random_blocks"]

MAGIC = b"FLMTOKS1"
HEADER = 4096
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Tokens = np.ndarray | Tensor


class TokenFile:
    """A token file, opened through the memory map.

    Attributes:
        tokens: uint16 or uint32 [count], read-only, not loaded.
        starts: uint64 [documents], where each text begins.
        vocab_size: ids are below it.
        fingerprint: of the tokenizer that made it.

    Raises:
        DataError: the file is missing, not a token file, truncated, or its header is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = header = _read_header(self.path)
        dtype = _DTYPES[header["dtype"]]
        count, documents = header["count"], header["documents"]
        expected = HEADER + count * dtype.itemsize + documents * 8
        size = self.path.stat().st_size
        if size != expected:
            state = "truncated" if size < expected else "damaged"
            raise DataError(f"{self.path}: {state}: {size} bytes, and its header promises {expected}")
        self.tokens: np.ndarray = np.memmap(self.path, dtype, "r", HEADER, (count,))
        ends = HEADER + count * dtype.itemsize
        self.starts: np.ndarray = np.memmap(self.path, np.dtype("<u8"), "r", ends, (documents,))
        self.vocab_size: int = header["vocab_size"]
        self.fingerprint: str = header["tokenizer"]

    def __len__(self) -> int:
        return len(self.tokens)

    def verify(self) -> None:
        """Reads the whole file against its checksum. Raises DataError where they differ."""
        checksum = 0
        with open(self.path, "rb") as stream:
            stream.seek(HEADER)
            while chunk := stream.read(1 << 22):
                checksum = zlib.crc32(chunk, checksum)
        if checksum != self.header["crc32"]:
            raise DataError(f"{self.path}: damaged: checksum {checksum:08x}, expected {self.header['crc32']:08x}")

    def split(self, validation: float, *, by: str = "tail") -> tuple[np.ndarray, np.ndarray]:
        """The first part for training and the rest for validation, both views of the map.

        Args:
            validation: the fraction to hold out, between 0 and 1.
            by: "tail" cuts exactly there; "document" at the start of a text, so that none is in both.

        Raises:
            ValueError: `validation` or `by` is none of these.
            DataError: one of the two parts would be empty.
        """
        if not 0.0 < validation < 1.0:
            raise ValueError(f"validation: {validation}, expected a fraction between 0 and 1")
        cut = len(self) - max(1, round(len(self) * validation))
        if by == "document":
            inner = np.asarray(self.starts[1:])
            if not len(inner):
                raise DataError(f"{self.path}: one text alone can't be split by document; use by='tail'")
            cut = int(inner[np.argmin(np.abs(inner.astype(np.int64) - cut))])
        elif by != "tail":
            raise ValueError(f"by: {by!r}, expected 'tail' or 'document'")
        if not 0 < cut < len(self):
            raise DataError(f"{self.path}: {len(self)} tokens are too few to hold out {validation:.0%}")
        return self.tokens[:cut], self.tokens[cut:]


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(HEADER)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    if not raw.startswith(MAGIC):
        raise DataError(f"{path}: not a token file (it begins with {raw[:8]!r}, expected {MAGIC!r})")
    if len(raw) < HEADER:
        raise DataError(f"{path}: truncated: {len(raw)} bytes, less than its header")
    try:
        header = json.loads(raw[len(MAGIC) :])
    except ValueError as error:
        raise DataError(f"{path}: damaged header: {error}") from error
    kinds = {"dtype": str, "count": int, "documents": int, "vocab_size": int, "tokenizer": str, "crc32": int}
    for key, kind in kinds.items():
        value: Any = header.get(key) if isinstance(header, dict) else None
        bad = not isinstance(value, kind) or (key == "dtype" and value not in _DTYPES)
        if bad or (key in ("count", "documents", "vocab_size") and value < 1):
            raise DataError(f"{path}: damaged header: {key} is {value!r}")
    return header


def encode_to_file(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    end_of_text: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TokenFile:
    """Encodes texts one after the other into a token file; memory holds one text at a time.

    The file appears under its name when it is complete: what was there before stays until then.

    Args:
        texts: each is a document.
        end_of_text: put the tokenizer's eos after each.
        progress: called after each text with the characters and tokens so far.

    Raises:
        DataError: `texts` hold no text, or the file can't be written (full disk, ...).
    """
    path = Path(path)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    end = [tokenizer.eos_id] if end_of_text and tokenizer.eos_id is not None else []
    starts = array.array("Q")
    count, checksum, characters = 0, 0, 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(b"\0" * HEADER)

            def write(data: bytes) -> None:
                nonlocal checksum
                checksum = zlib.crc32(data, checksum)
                stream.write(data)

            for text in texts:
                ids = tokenizer.encode(text)
                if not ids:
                    continue
                starts.append(count)
                write(np.asarray(ids + end, dtype).tobytes())
                count += len(ids) + len(end)
                characters += len(text)
                if progress is not None:
                    progress(characters, count)
            if not count:
                raise DataError(f"{path}: not written: the texts are empty")
            if sys.byteorder == "big":
                starts.byteswap()
            write(starts.tobytes())
            header = {
                "dtype": {2: "uint16", 4: "uint32"}[dtype.itemsize],
                "count": count,
                "documents": len(starts),
                "characters": characters,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": tokenizer.fingerprint,
                "crc32": checksum,
            }
            stream.seek(0)
            stream.write((MAGIC + json.dumps(header).encode()).ljust(HEADER))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise DataError(f"{path}: can't be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return TokenFile(path)


def random_blocks(tokens: Tokens, block: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of blocks from anywhere in the stream. It depends on (seed, step) alone, so resuming is exact.

    Args:
        tokens: integers [N], an array, a memory map or a tensor.
        block: tokens an input row; each target is the token after.

    Returns:
        Inputs and targets, int64 [batch, block].

    Raises:
        ValueError: `tokens` are no more than `block`, or `block` or `batch` is below 1.
    """
    _check_sizes(tokens, block, batch, block + 1)
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts = generator.integers(0, len(tokens) - block, size=batch)
    rows = _gather(tokens, starts[:, None] + np.arange(block + 1))
    return rows[:, :-1], rows[:, 1:]


class ContiguousBatch(NamedTuple):
    """What `ContiguousBatches` gives: int64 [batch, block] twice, and whether carried state must be reset first."""

    inputs: Tensor
    targets: Tensor
    starts_over: bool


class ContiguousBatches:
    """Truncated backpropagation through time: row b of step s + 1 goes on where row b of step s stopped.

    The stream is cut into `batch` rows of equal length, each read in blocks; at the end of the rows they start over.
    A batch depends on its step alone. What does not fill a block in every row is left out (less than
    batch * (block + 1) tokens).

    Raises:
        ValueError: `tokens` are too few for one block a row, or `block` or `batch` is below 1.
    """

    def __init__(self, tokens: Tokens, block: int, batch: int) -> None:
        _check_sizes(tokens, block, batch, batch * block + 1)
        self._tokens = tokens
        self._block = block
        self._blocks = (len(tokens) - 1) // batch // block
        self._starts = np.arange(batch) * ((len(tokens) - 1) // batch)

    def __len__(self) -> int:
        """Steps until the rows start over."""
        return self._blocks

    def __getitem__(self, step: int) -> ContiguousBatch:
        """The batch of a step, 0 or more, without end."""
        if step < 0:
            raise IndexError(f"step: {step}, expected 0 or more")
        at = step % self._blocks
        rows = _gather(self._tokens, (self._starts + at * self._block)[:, None] + np.arange(self._block + 1))
        return ContiguousBatch(rows[:, :-1], rows[:, 1:], at == 0)


def _gather(tokens: Tokens, indices: np.ndarray) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens[torch.from_numpy(indices)].to(torch.int64)
    return torch.from_numpy(tokens[indices].astype(np.int64))


def _check_sizes(tokens: Tokens, block: int, batch: int, needed: int) -> None:
    for name, value in (("block", block), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: {value}, expected 1 or more")
    if len(tokens) < needed:
        raise ValueError(f"tokens: {len(tokens)} are too few for block {block} and batch {batch}: {needed} are needed")
