"""Tokenizers made here, and what holds for all of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_strings import INVALID_UTF8, STRINGS

from fastlm.data import DataError, Tokenizer

TEXTS = ["the cat sat on the mat, the cat sat.\n", "a dog, 12 dogs and the cat\n\n  Ünïcode 你好\n"] * 5
BPE = Tokenizer.train_bpe(TEXTS + STRINGS, 400)
BYTE = Tokenizer.byte()

MADE = {
    "byte": BYTE,
    "bpe": BPE,
    "character": Tokenizer.character(TEXTS),
    "word": Tokenizer.word(TEXTS),
}


@given(st.text())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_byte_level_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@pytest.mark.parametrize("text", STRINGS)
def test_listed_strings_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["character", "word"])
def test_known_text_round_trips_and_unknown_is_marked(kind: str) -> None:
    tokenizer = MADE[kind]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("the\u2603 cat")
    assert ids.count(tokenizer.unk_id) == 1
    assert tokenizer.decode(ids) == "the\ufffd cat"


def test_byte_ids_are_the_bytes() -> None:
    assert BYTE.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert BYTE.encode(b"\xff\x00a") == [255, 0, 97]
    assert (BYTE.vocab_size, BYTE.eos_id) == (257, 256)


@pytest.mark.parametrize("kind", ["byte", "character"])
@pytest.mark.parametrize("text", STRINGS)
def test_short_cuts_agree_with_the_library(kind: str, text: str) -> None:
    tokenizer = MADE[kind]
    tokenizer._backend.encode_special_tokens = True
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids


def test_character_ids_are_sorted_and_complete() -> None:
    tokenizer = Tokenizer.character(["banana\n"])
    assert tokenizer.vocab_size == 4 + 2
    assert tokenizer.encode("\nabn") == [1, 2, 3, 4]
    assert Tokenizer.character(["banana"], min_count=2).decode([1, 2]) == "an"


def test_word_vocabulary_keeps_the_most_frequent() -> None:
    texts = ["x x x x y y y z z w"]
    tokenizer = Tokenizer.word(texts, max_vocab=4)  # unknown, end, and the two most frequent
    assert tokenizer.vocab_size == 4
    assert [tokenizer.unk_id == id for id in tokenizer.encode(" x y z w")] == [False, False, True, True]
    frequent = Tokenizer.word(texts, min_count=2)
    assert [frequent.unk_id == id for id in frequent.encode(" x y z w")] == [False, False, False, True]


def test_bpe_learns_what_repeats() -> None:
    assert BPE.vocab_size == 400
    assert len(BPE.encode("the cat sat on the mat")) <= 7
    assert BPE.token_bytes(BPE.encode(" the")[0]) == b" the"


@pytest.mark.parametrize("kind", MADE)
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = MADE[kind]
    tokenizer.save(tmp_path / "folder")
    loaded = Tokenizer.load(tmp_path / "folder")
    for text in STRINGS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for name in ("kind", "vocab_size", "bos_id", "eos_id", "unk_id", "stop_ids", "chat_template", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name


def test_fingerprint_tells_tokenizers_apart() -> None:
    prints = {tokenizer.fingerprint for tokenizer in MADE.values()}
    prints.add(Tokenizer.train_bpe(TEXTS, 300).fingerprint)
    assert len(prints) == len(MADE) + 1
    assert Tokenizer.train_bpe(TEXTS, 300).fingerprint == Tokenizer.train_bpe(TEXTS, 300).fingerprint


# Control tokens


@pytest.mark.parametrize("kind", MADE)
def test_control_tokens_are_text_unless_asked_for(kind: str) -> None:
    tokenizer = MADE[kind]
    text = "the<|endoftext|> cat"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(parsed) == "the cat"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert tokenizer.stop_ids == {tokenizer.eos_id}


def test_threads_do_not_mix_up_parsing() -> None:
    def encode(index: int) -> bool:
        parse = bool(index % 2)
        return (BPE.eos_id in BPE.encode("a<|endoftext|>b", parse_special=parse)) == parse

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(encode, range(2000)))


# Bytes that are no UTF-8


@pytest.mark.parametrize("data", INVALID_UTF8)
def test_each_invalid_byte_becomes_a_replacement_character(data: bytes) -> None:
    text = BPE.decode(BPE.encode(data))
    assert text.replace("\ufffd", "") == data.decode("utf-8", errors="ignore")
    assert len(text.replace("\ufffd", "").encode()) + text.count("\ufffd") == len(data)
    assert b"".join(map(BYTE.token_bytes, BYTE.encode(data))) == data


def test_lone_surrogate_is_named() -> None:
    for tokenizer in (BPE, BYTE):
        with pytest.raises(DataError, match=r"lone surrogate U\+DC80 at character 2"):
            tokenizer.encode("ab\udc80")


def test_streamed_bytes_make_whole_characters() -> None:
    ids = BPE.encode("日本語 😀")
    assert b"".join(BPE.token_bytes(id) for id in ids).decode() == "日本語 😀"
    assert any(BPE.token_bytes(id).decode(errors="ignore").encode() != BPE.token_bytes(id) for id in ids)
    assert "\ufffd" in BPE.decode(BYTE.encode("😀")[:2])


# Errors


def test_bad_arguments_are_named() -> None:
    with pytest.raises(DataError, match="vocab_size: 100, expected 257 or more"):
        Tokenizer.train_bpe(TEXTS, 100)
    with pytest.raises(DataError, match="max_vocab: 2"):
        Tokenizer.word(TEXTS, max_vocab=2)
    with pytest.raises(DataError, match="id: 257, expected 0 to 256"):
        BYTE.decode([257])
    with pytest.raises(DataError, match="id: -1"):
        BYTE.token_bytes(-1)
    with pytest.raises(TypeError, match="text: int"):
        BPE.encode(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [[], [""]])
def test_empty_text_is_an_error(texts: list[str]) -> None:
    for make in (Tokenizer.character, Tokenizer.word, lambda texts: Tokenizer.train_bpe(texts, 300)):
        with pytest.raises(DataError, match="texts: "):
            make(texts)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)
    for kind in ("byte", "character"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"fastlm": {"kind": kind}}))
        with pytest.raises(DataError, match=f"kind: '{kind}', and the vocabulary is not one of single {kind}s"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match="decoder WordPiece is not supported"):
        Tokenizer.load(tmp_path)
