"""Streaming text: pieces join to the whole, never split a character, never show part of a stop string."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fastlm.generation import TextAssembler


def assemble(data: bytes, cuts: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> list[str]:
    """Feeds `data`, cut into tokens at `cuts`, and returns the pieces."""
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    tokens = [data[a:b] for a, b in itertools.pairwise(edges)]
    assembler = TextAssembler(tokens.__getitem__, stop, min_tokens)
    pieces = []
    for index in range(len(tokens)):
        pieces.append(assembler.push(index))
        if assembler.stopped:
            break
    return [*pieces, assembler.finish()]


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_pieces_join_to_the_text_and_are_whole_characters(text: str, cuts: list[int]) -> None:
    pieces = assemble(text.encode(), cuts)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(), st.lists(st.integers(0, 1000)))
def test_invalid_utf8_becomes_replacement_characters(data: bytes, cuts: list[int]) -> None:
    assert "".join(assemble(data, cuts)) == data.decode(errors="replace")


@given(
    st.text(alphabet="ab\n", max_size=40),
    st.lists(st.integers(0, 1000)),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stops_before_the_first_stop_string_wherever_tokens_are_cut(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    pieces = assemble(text.encode(), cuts, tuple(stop))
    joined = "".join(pieces)
    at = [text.find(s) for s in stop if s in text]
    if not at:
        assert joined == text
    else:
        # Tokens are whole: where one token completes several stop strings, the earliest counts; a later token can't.
        assert text.startswith(joined)
        assert not any(s in joined for s in stop)
        assert any(text.startswith(s, len(joined)) for s in stop)


def test_a_possible_stop_string_is_held_back_until_it_is_certain() -> None:
    tokens = [b"one EN", b"D", b"LESS END", b" x"]
    assembler = TextAssembler(tokens.__getitem__, ["END."])
    assert [assembler.push(i) for i in range(4)] == ["one ", "", "ENDLESS ", "END x"]


def test_a_stop_string_before_min_tokens_is_ordinary_text() -> None:
    tokens = [b"END", b" a", b" END", b" b"]
    assembler = TextAssembler(tokens.__getitem__, ["END"], min_tokens=3)
    pieces = [assembler.push(i) for i in range(3)]
    assert "".join(pieces) == "END a "
    assert assembler.stopped
