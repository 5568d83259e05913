"""Text as a stream: embedded corpora, files, folders and standard input.

Memory stays bounded: a text longer than `PIECE` characters comes in pieces.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastlm.data.errors import DataError

__all__ = ["CORPORA", "PIECE", "TEXT_SUFFIXES", "corpus", "read_file"]

PIECE = 1 << 20  # characters

_PROSE = (
    ".txt .text .md .markdown .rst .tex .csv .tsv .json .jsonl .html .htm .xml .yaml .yml .toml .ini .cfg .log .srt"
)
_CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt .js .ts .jsx .tsx .css .sh .rb .pl .lua .sql .swift .jl .r"
)
TEXT_SUFFIXES = frozenset(_PROSE.split() + _CODE.split())

# A line break between two visible characters: tokenizers treat runs of whitespace as one, so only here do the
# pieces' tokens add up to the whole text's.
_GOOD_CUT = re.compile(r"\S\n(?=\S)")


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, frozenset({".py"}), skip=frozenset({"site-packages", "dist-packages", "test", "tests"})):
        try:
            yield from read_file(path)
        except DataError:  # a few files are there to test other encodings
            continue


CORPORA = {
    "topics": ("half a megabyte of English prose about Python, from CPython's own help", _topics),
    "stdlib": ("some 10 MB of Python code, CPython's standard library", _stdlib),
}


def corpus(name: str | Path) -> Iterator[str]:
    """The texts of a corpus, one by one, none of them empty.

    Args:
        name: "topics" or "stdlib" (on every machine), a file, a folder (its files with a suffix in `TEXT_SUFFIXES`, in
            alphabetical order, at any depth; hidden ones are left out), or "-" for standard input. UTF-8 throughout.

    Yields:
        One text a file or topic; longer ones in pieces of about `PIECE` characters, cut at a line's end.

    Raises:
        DataError: nothing there, no text in it, a binary file, or bytes that are not UTF-8 (with file and offset).
    """
    found = False
    for text in _open(str(name)):
        if text:
            found = True
            yield text
    if not found:
        raise DataError(f"{'standard input' if str(name) == '-' else name}: empty, there is no text in it")


def _open(name: str) -> Iterator[str]:
    if name in CORPORA:
        return CORPORA[name][1]()
    if name == "-":
        return _read(sys.stdin.buffer, "standard input")
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise DataError(f"{name}: no such file or folder, and no corpus of that name ({', '.join(sorted(CORPORA))})")
    return read_file(path)


def _folder(folder: Path) -> Iterator[str]:
    empty = True
    for path in _walk(folder, TEXT_SUFFIXES):
        empty = False
        yield from read_file(path)
    if empty:
        raise DataError(f"{folder}: no file with a known text suffix (.txt, .md, .py, ...) in this folder")


def _walk(folder: Path, suffixes: frozenset[str], skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(root, name)


def read_file(path: str | Path) -> Iterator[str]:
    """A UTF-8 file's text, in pieces of about `PIECE` characters. Raises DataError as `corpus`."""
    try:
        with open(path, "rb") as stream:
            yield from _read(stream, str(path))
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error


def _read(stream: BinaryIO, name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held = 0, ""
    while True:
        data = stream.read(PIECE)
        pending = len(decoder.getstate()[0])
        _refuse_binary(data, name, offset)
        try:
            held += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            raise DataError(
                f"{name}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8: {error.reason}; "
                "convert the file first, as `iconv -t utf-8` does"
            ) from error
        offset += len(data)
        if not data:
            break
        while len(held) > PIECE:
            cut = _cut(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _refuse_binary(data: bytes, name: str, offset: int) -> None:
    if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: UTF-16 text; convert it to UTF-8 first, as `iconv -f utf-16 -t utf-8` does")
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name}: a binary file (zero byte at {offset + zero}), expected text")


def _cut(text: str) -> int:
    """Where to end a piece: at most `PIECE`, and past half of it."""
    best = 0
    for match in _GOOD_CUT.finditer(text, PIECE // 2, PIECE):
        best = match.end()
    return best or (text.rfind("\n", PIECE // 2, PIECE) + 1) or PIECE
