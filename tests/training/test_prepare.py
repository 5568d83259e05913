"""Text to token files: the split, the tokenizer, the cache, and text that can't be used."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import DataError, corpora
from fastlm.training import prepare as module
from fastlm.training.prepare import DataOptions, load, prepare

TEXT = "".join(f"Line {i} of a smäll text.\n" for i in range(200))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _decode(prepared: Any, name: str) -> str:
    return str(prepared.tokenizer.decode(getattr(prepared, name).tokens.tolist()))


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "word"])
def test_both_parts_are_the_text_cut_at_a_line(tmp_path: Path, text: Path, kind: str) -> None:
    prepared = prepare(
        DataOptions(str(text), tokenizer=kind, vocab_size=300 if kind == "bpe" else None), tmp_path / "d"
    )
    train, valid = _decode(prepared, "train"), _decode(prepared, "valid")
    if kind == "word":  # "180" and the like are new words
        assert valid.startswith("Line") and valid.endswith(" of a smäll text.\n")
    else:
        assert train + valid == TEXT
    assert train.endswith("\n")
    assert prepared.train_bytes + prepared.valid_bytes == len(TEXT.encode())
    assert prepared.valid_bytes == pytest.approx(0.1 * len(TEXT.encode()), rel=0.1)


@given(st.lists(st.text("aä漢\n ", min_size=1), min_size=1), st.integers(0, 200))
def test_no_character_is_lost_or_doubled(texts: list[str], boundary: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "corpus", lambda source: iter(texts))
        parts = module._Parts("x", boundary)
        assert "".join(parts.train()) + "".join(parts.valid()) == "".join(texts)


def test_the_tokenizer_has_not_seen_the_validation_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc\n" * 300 + "zzz\n" * 10)
    prepared = prepare(DataOptions(str(path), tokenizer="char"), tmp_path / "d")
    assert prepared.tokenizer.unk_id in prepared.valid.tokens.tolist()
    assert prepared.tokenizer.encode("z") == [prepared.tokenizer.unk_id]


def test_a_validation_text_of_its_own(tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Other text.\n")
    prepared = prepare(DataOptions(str(text), valid=str(other), tokenizer="byte"), tmp_path / "d")
    assert (_decode(prepared, "train"), _decode(prepared, "valid")) == (TEXT, "Other text.\n")


def test_long_texts_come_in_pieces(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 500)
    prepared = prepare(DataOptions(str(text), tokenizer="byte"), tmp_path / "d")
    assert _decode(prepared, "train") + _decode(prepared, "valid") == TEXT
    assert prepared.train.header["documents"] > 5


def test_the_cache_is_used_until_anything_changes(tmp_path: Path, text: Path) -> None:
    options = DataOptions(str(text), tokenizer="byte")
    assert not prepare(options, tmp_path / "d").cached
    assert prepare(options, tmp_path / "d").cached
    assert not prepare(DataOptions(str(text), tokenizer="char"), tmp_path / "d").cached
    assert not prepare(options, tmp_path / "d").cached
    stamp = text.stat().st_mtime_ns
    os.utime(text, ns=(stamp, stamp + 1_000_000_000))
    assert not prepare(options, tmp_path / "d").cached
    text.unlink()
    assert load(tmp_path / "d").tokenizer.kind == "byte"


def test_a_preparation_cut_short_is_no_cache(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(DataOptions(str(text), tokenizer="byte"), tmp_path / "d")
    encode = module.encode_to_file

    def dies_on_validation(texts: Any, tokenizer: Any, path: Path) -> Any:
        if path.name == "valid.tokens":
            raise KeyboardInterrupt
        return encode(texts, tokenizer, path)

    monkeypatch.setattr(module, "encode_to_file", dies_on_validation)
    with pytest.raises(KeyboardInterrupt):
        prepare(DataOptions(str(text), tokenizer="char"), tmp_path / "d")
    with pytest.raises(DataError, match=r"no data\.json"):
        load(tmp_path / "d")


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    prepared = prepare(DataOptions("-", tokenizer="byte"), tmp_path / "d")
    assert _decode(prepared, "train") + _decode(prepared, "valid") == TEXT


def test_a_tokenizer_from_a_folder(tmp_path: Path, text: Path) -> None:
    first = prepare(DataOptions(str(text), vocab_size=280), tmp_path / "d")
    second = prepare(DataOptions(str(text), tokenizer=str(tmp_path / "d")), tmp_path / "e")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"text\.txt: empty"),
        (b"x", r"text\.txt: 1 bytes of text leave nothing for"),
        (b"abc\xff\xfe\n" * 10, r"text\.txt: byte 3"),
        (b"abc\x00", r"text\.txt: a binary file"),
        (None, r"text\.txt: no such file"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(DataOptions(str(path), tokenizer="byte"), tmp_path / "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "morse"}, "tokenizer: 'morse', expected bpe"),
        ({"tokenizer": "byte", "vocab_size": 300}, "vocab_size: 300, expected none"),
        ({"vocab_size": 10}, "vocab_size: 10"),
        ({"valid_fraction": 1.0}, "valid_fraction: 1.0"),
        ({"clean": ("nfc", "bleach")}, "cleaning step 'bleach' is unknown; there are: strip_bom"),
    ],
)
def test_options_out_of_range(tmp_path: Path, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(DataOptions(str(text), **options), tmp_path / "d")


def test_text_is_cleaned_by_the_named_steps(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffFirst  Line\r\nCAFE\u0301\r\n".encode() * 20)
    options = DataOptions(str(path), tokenizer="byte", clean=("strip_bom", "normalize_newlines", "nfc", "lowercase"))
    prepared = prepare(options, tmp_path / "d")
    ids = [*prepared.train.tokens, *prepared.valid.tokens]
    text = prepared.tokenizer.decode(ids)
    assert text.startswith("first  line\ncafé\n")
    assert "\r" not in text
    assert prepare(options, tmp_path / "d").cached
    assert not prepare(DataOptions(str(path), tokenizer="byte"), tmp_path / "d").cached
    path.write_text(" \n ")
    with pytest.raises(DataError, match=r"text\.txt: cleaning \(collapse_whitespace\) leaves no text"):
        prepare(DataOptions(str(path), tokenizer="byte", clean=("collapse_whitespace",)), tmp_path / "d")


def test_damage_is_named(tmp_path: Path, text: Path) -> None:
    options = DataOptions(str(text), tokenizer="byte")
    prepare(options, tmp_path / "d")
    (tmp_path / "d" / "train.tokens").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"train\.tokens"):
        load(tmp_path / "d")
    (tmp_path / "d" / "data.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.json: damaged"):
        load(tmp_path / "d")


def test_the_default_vocabulary_grows_with_the_text() -> None:
    sizes = [module.default_vocab_size(n) for n in (1000, 1_000_000, 1_000_000_000)]
    assert sizes == [512, 1920, 16_384]
