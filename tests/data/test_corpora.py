"""Where text comes from."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from fastlm.data import DataError, Tokenizer, corpora, corpus


def test_embedded_corpora_are_large_and_stable() -> None:
    topics = list(corpus("topics"))
    assert sum(map(len, topics)) > 400_000
    assert topics == list(corpus("topics"))
    code = corpus("stdlib")
    assert sum(len(next(code)) for _ in range(100)) > 500_000


def test_file_is_yielded_exactly(tmp_path: Path) -> None:
    text = "Ünïcode\r\nline\n\n\u2028😀"
    (tmp_path / "a.any").write_bytes(text.encode())
    assert list(corpus(tmp_path / "a.any")) == [text]


def test_folder_is_read_in_order_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".hidden/x.txt", "image.png", ".dot.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(corpus(tmp_path)) == ["b.txt", "a/z.md", "a/b/c.py"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo\n".encode())))
    assert list(corpus("-")) == ["héllo\n"]


def test_long_text_comes_in_pieces_with_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1000)
    text = "".join(f"line {i}: some wörds and 日本\n{'    ' * (i % 3)}indented\n\n" for i in range(300))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(corpus(path))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert max(map(len, pieces)) <= 1000
    tokenizer = Tokenizer.train_bpe([text], 400)
    assert [id for piece in pieces for id in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["x" * 5000, "y\n" * 2500, "日" * 3000])
def test_pieces_without_a_good_cut(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(corpus(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, there is no text"),
        (b"fine\xff", r"byte 4 \(0xff\) is not UTF-8: invalid start byte"),
        (b"x" * 1500 + b"\xe9t\xe9", r"byte 1500 \(0xe9\) is not UTF-8"),
        (b"x" * 999 + b"\xe2\x82", r"byte 999 \(0xe2\) is not UTF-8: unexpected end of data"),
        (b"x" * 999 + b"\xe2\x82(", r"byte 999 \(0xe2\) is not UTF-8"),
        (b"\x7fELF\x00\x01", r"a binary file \(zero byte at 4\)"),
        ("text".encode("utf-16"), "UTF-16 text; convert it"),
    ],
)
def test_unreadable_files_are_named_with_the_offset(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1000)
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.txt: {message}"):
        list(corpus(path))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"topix: no such file or folder, and no corpus of that name \(stdlib, topics\)"
    ):
        list(corpus("topix"))
    with pytest.raises(DataError, match="no file with a known text suffix"):
        list(corpus(tmp_path))
