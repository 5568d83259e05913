"""Each cleaning step does what its description says, and no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_strings import STRINGS

from fastlm.data.cleaning import CLEANING_STEPS, clean

OLD_GUTENBERG = """Project Gutenberg's Etext of something
***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
legal text
*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*

ACT I
To be, or not.

End of this Project Gutenberg Etext of something
"""
NEW_GUTENBERG = """The Project Gutenberg eBook of something
*** START OF THE PROJECT GUTENBERG EBOOK SOMETHING ***

ACT I
To be, or not.

*** END OF THE PROJECT GUTENBERG EBOOK SOMETHING ***
licence
"""

EXAMPLES = [
    ("strip_bom", "\ufeffa\ufeff", "a\ufeff"),
    ("normalize_newlines", "a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
    ("nfc", "e\u0301 ﬁ ２", "é ﬁ ２"),
    ("nfkc", "e\u0301 ﬁ ２ ²", "é fi 2 2"),
    ("strip_control", "a\x00b\x1b[0m\tc\r\n\x85d", "ab[0m\tc\r\nd"),
    ("strip_zero_width", "a\u200bb\u00adc\ufeffd👩\u200d🚀", "abcd👩\u200d🚀"),
    ("straight_quotes", "“It’s” – an… em—dash", '"It\'s" - an... em--dash'),
    (
        "strip_html",
        "<p class='x'>a &lt; b &amp;amp; <br/>c</p><!-- <b> --><script>x<y</script> 1<2 2 > 1",
        "a < b &amp; c 1<2 2 > 1",
    ),
    ("strip_gutenberg_header", OLD_GUTENBERG, "ACT I\nTo be, or not.\n"),
    ("strip_gutenberg_header", NEW_GUTENBERG, "ACT I\nTo be, or not.\n"),
    ("strip_gutenberg_header", "\n\nno header\n\n", "\n\nno header\n\n"),
    ("strip_trailing_space", "a \t\n  b  \n c", "a\n  b\n c"),
    ("collapse_spaces", "a \t\u00a0 b\n\n  c", "a b\n\n c"),
    ("collapse_blank_lines", "a\n\n\n \n\nb\n\nc\nd", "a\n\nb\n\nc\nd"),
    ("collapse_whitespace", "  a \n\n b\t c ", "a b c"),
    ("lowercase", "ÀB C", "àb c"),
]


@pytest.mark.parametrize(("step", "text", "expected"), EXAMPLES)
def test_step(step: str, text: str, expected: str) -> None:
    assert list(clean([text], [step])) == [expected]


def test_every_step_has_an_example_and_a_description() -> None:
    assert {step for step, _, _ in EXAMPLES} == set(CLEANING_STEPS)
    assert all(step.description for step in CLEANING_STEPS.values())


@pytest.mark.parametrize("step", CLEANING_STEPS)
def test_plain_text_is_left_alone(step: str) -> None:
    text = "plain text, with commas.\nand a second line\n\nand a third\n"
    expected = " ".join(text.split()) if step == "collapse_whitespace" else text
    assert list(clean([text], [step])) == [expected]


@given(
    st.sampled_from(
        [name for name in CLEANING_STEPS if name not in ("strip_html", "strip_gutenberg_header", "strip_bom")]
    ),
    st.text(),
)
def test_a_second_time_changes_nothing(step: str, text: str) -> None:
    once = list(clean([text], [step]))
    assert list(clean(once, [step])) == once


def test_steps_compose_in_order_and_drop_empty_texts() -> None:
    assert list(
        clean(["\ufeffA \r\n", "\x00", "B"], ["strip_bom", "strip_control", "collapse_whitespace", "lowercase"])
    ) == [
        "a",
        "b",
    ]
    assert list(clean(STRINGS, [])) == [text for text in STRINGS if text]


def test_texts_are_streamed() -> None:
    def texts() -> object:
        yield "one"
        raise AssertionError("asked for too much")

    assert next(clean(texts(), ["lowercase"])) == "one"  # type: ignore[arg-type]


def test_unknown_step_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="cleaning step 'upper' is unknown; there are: strip_bom, "):
        clean(["a"], ["nfc", "upper"])
