"""From text to token files: the split into training and validation, the tokenizer, the cache beside the run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastlm.checkpoints.atomic import write_atomic, write_json_atomic
from fastlm.data import DataError, TokenFile, Tokenizer, clean, corpus, encode_to_file
from fastlm.data.cleaning import check_steps

TokenizerKind = Literal["bpe", "byte", "char", "word"]
TOKENIZER_KINDS: tuple[TokenizerKind, ...] = ("bpe", "byte", "char", "word")
_TOKENIZER_BYTES = 100 << 20
"""A tokenizer is learnt from at most this much text: more changes little, and its memory grows with distinct words."""
_MAX_VALIDATION_BYTES = 10 << 20


@dataclass(frozen=True)
class PreparedData:
    """Token files of a run. `*_bytes` are the UTF-8 bytes of the text they stand for."""

    tokenizer: Tokenizer
    train: TokenFile
    valid: TokenFile
    train_bytes: int
    valid_bytes: int
    cached: bool


@dataclass(frozen=True)
class DataOptions:
    """What decides the token files: change any of it and they are made anew.

    Attributes:
        data: a corpus name, a file, a folder, or "-" for standard input.
        valid: the same for validation text; None holds out the last `valid_fraction` of `data`, at most 10 MB.
        tokenizer: "bpe", "byte", "char" or "word", learnt from the training text alone; or a folder with a tokenizer.
        vocab_size: for bpe and word; None picks one by the length of the text.
        clean: steps of `fastlm.data.CLEANING_STEPS`, applied to all text in this order.
    """

    data: str
    valid: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    valid_fraction: float = 0.1
    clean: tuple[str, ...] = ()


def prepare(options: DataOptions, folder: str | Path, *, report: Callable[[str], None] | None = None) -> PreparedData:
    """Tokenises text into `folder`, or finds it there from before. Memory stays bounded, however long the text.

    `report` hears what is being done. Raises `DataError` for text that is missing, empty, no UTF-8 or too short, and
    `ValueError` naming the option for one out of range.
    """
    folder, say = Path(folder), report or (lambda line: None)
    if not 0 < options.valid_fraction < 1:
        raise ValueError(f"valid_fraction: {options.valid_fraction}, expected between 0 and 1")
    check_steps(options.clean)
    key = _key(options)
    known = _read_meta(folder)
    if options.data != "-" and known is not None and known["key"] == key:
        return load(folder, cached=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").unlink(missing_ok=True)  # from here to the end the folder is no cache
    source = options.data
    if source == "-":
        source = str(folder / "stdin.txt")
        write_atomic(source, _spool_stdin)
    total = sum(len(text.encode()) for text in clean(corpus(source), options.clean))
    if not total:
        raise DataError(f"{options.data}: cleaning ({', '.join(options.clean)}) leaves no text")
    if options.valid is None:
        held_out = min(round(total * options.valid_fraction), _MAX_VALIDATION_BYTES)
        parts = _Parts(source, total - held_out, options.clean)
    else:
        parts = _Parts(source, None, options.clean)
    say(f"text: {_size(total)} from {options.data}")
    tokenizer = _tokenizer(options, parts, total, say)
    tokenizer.save(folder)

    def counted(texts: Iterator[str], name: str) -> tuple[TokenFile, int]:
        found = 0

        def watch() -> Iterator[str]:
            nonlocal found
            for text in texts:
                found += len(text.encode())
                yield text

        try:
            file = encode_to_file(watch(), tokenizer, folder / f"{name}.tokens")
        except DataError as error:
            if found:
                raise
            raise DataError(f"{options.data}: {_size(total)} of text leave nothing for {name}") from error
        say(f"{name}: {len(file):,} tokens ({found / len(file):.2f} bytes each)")
        return file, found

    _, train_bytes = counted(parts.train(), "train")
    _, valid_bytes = counted(
        parts.valid() if options.valid is None else clean(corpus(options.valid), options.clean), "valid"
    )
    meta = {"key": key, "train_bytes": train_bytes, "valid_bytes": valid_bytes, "options": asdict(options)}
    write_json_atomic(folder / "data.json", meta)
    return load(folder)


def load(folder: str | Path, *, cached: bool = False) -> PreparedData:
    """Opens what `prepare` made in `folder`. Raises `DataError` where it is missing or damaged."""
    folder = Path(folder)
    meta = _read_meta(folder)
    if meta is None:
        raise DataError(f"{folder}: no tokenised data here (no data.json)")
    tokenizer = Tokenizer.load(folder)
    train, valid = TokenFile(folder / "train.tokens"), TokenFile(folder / "valid.tokens")
    for file in (train, valid):
        if file.fingerprint != tokenizer.fingerprint:
            raise DataError(f"{file.path}: made with another tokenizer than the one beside it")
    return PreparedData(tokenizer, train, valid, meta["train_bytes"], meta["valid_bytes"], cached)


class _Parts:
    """The text of a source up to about byte `boundary` and from there on; the cut is moved to the next line's start."""

    def __init__(self, source: str, boundary: int | None, steps: tuple[str, ...] = ()):
        self._source, self._steps, self._boundary = source, steps, boundary

    def train(self) -> Iterator[str]:
        return self._part(first=True)

    def valid(self) -> Iterator[str]:
        return self._part(first=False)

    def _part(self, first: bool) -> Iterator[str]:
        position = 0
        for text in clean(corpus(self._source), self._steps):
            size = len(text.encode())
            if self._boundary is None or position + size <= self._boundary:
                part = text if first else ""
            elif position >= self._boundary:
                part = "" if first else text
            else:
                cut = len(text.encode()[: self._boundary - position].decode(errors="ignore"))
                cut = text.find("\n", cut) + 1 or text.find(" ", cut) + 1 or cut
                part = text[:cut] if first else text[cut:]
            position += size
            if part:
                yield part
            elif first:
                return


def _tokenizer(options: DataOptions, parts: _Parts, total: int, say: Callable[[str], None]) -> Tokenizer:
    kind = options.tokenizer
    if kind not in TOKENIZER_KINDS:
        if not Path(kind).is_dir():
            raise ValueError(f"tokenizer: {kind!r}, expected {', '.join(TOKENIZER_KINDS)} or a folder with a tokenizer")
        return Tokenizer.load(kind)
    if options.vocab_size is not None and kind not in ("bpe", "word"):
        raise ValueError(f"vocab_size: {options.vocab_size}, expected none: a {kind} tokenizer's follows from the text")
    if kind == "byte":
        return Tokenizer.byte()
    say(f"tokenizer: learning {kind}")
    texts = _at_most(parts.train(), _TOKENIZER_BYTES)
    if kind == "char":
        return Tokenizer.character(texts)
    if kind == "word":
        return Tokenizer.word(texts, max_vocab=options.vocab_size or 10_000, min_count=2)
    return Tokenizer.train_bpe(texts, options.vocab_size or default_vocab_size(total))


def default_vocab_size(text_bytes: int) -> int:
    """A BPE vocabulary that leaves each token a few hundred occurrences: 512 for a short text, at most 16,384."""
    return max(512, min(16_384, text_bytes // 512 // 64 * 64))


def _at_most(texts: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        if seen >= limit:
            return
        seen += len(text)
        yield text


def _key(options: DataOptions) -> str:
    """A hash of the options and of what the files looked like (names, sizes, times)."""
    seen: list[Any] = [asdict(options), list(sys.version_info[:3])]
    for source in (options.data, options.valid):
        path = Path(source) if source is not None else None
        if path is not None and path.exists():
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            seen.append([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'data.json'}: damaged ({error}); delete {folder} to tokenise again") from error
    return dict(meta)


def _spool_stdin(path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        os.fsync(file.fileno())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count:,} bytes"
