"""Text cleaning and normalisation as explicit steps: a text is changed by the steps that are named, in their order."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

__all__ = ["CLEANING_STEPS", "Step", "check_steps", "clean"]


class Step(NamedTuple):
    """What a step does, in words and as a function."""

    description: str
    apply: Callable[[str], str]


def _strip_bom(text: str) -> str:
    return text.removeprefix("\ufeff")


def _strip_control(text: str) -> str:
    return _CONTROL.sub("", text)


def _strip_zero_width(text: str) -> str:
    return text.translate(_ZERO_WIDTH)


def _strip_html(text: str) -> str:
    return html.unescape(_TAG.sub("", _INVISIBLE_HTML.sub("", text)))


def _strip_gutenberg(text: str) -> str:
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    first = start.end() if start else 0
    last = end.start() if end and end.start() > first else len(text)
    return text[first:last].strip("\n") + "\n" if start or last < len(text) else text


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The joiners U+200C and U+200D stay: scripts and emoji need them.
_ZERO_WIDTH = dict.fromkeys((0x00AD, 0x200B, 0x2060, 0xFEFF))
_QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "--", "…": "..."})
_INVISIBLE_HTML = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Today's marks, and the "small print" of texts from before 2004.
_GUTENBERG_START = re.compile(
    r"^(?:\*{3} ?START OF TH(?:E|IS) PROJECT GUTENBERG.*?\*{3}|\*END[^\n]*THE SMALL PRINT[^\n]*)[^\n]*\n",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3} ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)",
    re.MULTILINE | re.IGNORECASE,
)

CLEANING_STEPS: dict[str, Step] = {
    "strip_bom": Step("remove a byte-order mark at the beginning", _strip_bom),
    "normalize_newlines": Step(
        r"make every \r\n and lone \r a \n", lambda text: text.replace("\r\n", "\n").replace("\r", "\n")
    ),
    "nfc": Step("Unicode NFC: composed characters; keeps the meaning", partial(unicodedata.normalize, "NFC")),
    "nfkc": Step(
        "Unicode NFKC: also full-width letters, ligatures, superscripts to plain ones",
        partial(unicodedata.normalize, "NFKC"),
    ),
    "strip_control": Step("remove control characters other than tab, line feed and carriage return", _strip_control),
    "strip_zero_width": Step("remove soft hyphens, zero-width spaces and byte-order marks anywhere", _strip_zero_width),
    "straight_quotes": Step("curly quotes, dashes and ellipsis to ASCII", lambda text: text.translate(_QUOTES)),
    "strip_html": Step("remove HTML tags, comments, scripts and styles; resolve entities", _strip_html),
    "strip_gutenberg_header": Step("keep what lies between Project Gutenberg's header and licence", _strip_gutenberg),
    "strip_trailing_space": Step(
        "remove spaces and tabs at the end of lines", partial(re.compile(r"[ \t]+$", re.MULTILINE).sub, "")
    ),
    "collapse_spaces": Step(
        "make every run of spaces, tabs and other blanks within a line one space",
        partial(re.compile(r"[^\S\n\r]+").sub, " "),
    ),
    "collapse_blank_lines": Step(
        "at most one blank line in a row", partial(re.compile(r"\n(?:[ \t]*\n){2,}").sub, "\n\n")
    ),
    "collapse_whitespace": Step(
        "make every run of whitespace one space, line breaks too, and none at the ends",
        lambda text: " ".join(text.split()),
    ),
    "lowercase": Step("lower case", str.lower),
}


def check_steps(steps: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in `CLEANING_STEPS`."""
    for name in steps:
        if name not in CLEANING_STEPS:
            raise ValueError(f"cleaning step {name!r} is unknown; there are: {', '.join(CLEANING_STEPS)}")


def clean(texts: Iterable[str], steps: Sequence[str]) -> Iterator[str]:
    """Applies the named steps to each text in a stream; texts that become empty are left out.

    Args:
        steps: keys of `CLEANING_STEPS`, applied in this order.

    Raises:
        ValueError: an unknown step (at once, before the first text is asked for).
    """
    check_steps(steps)
    return _clean(texts, [CLEANING_STEPS[name].apply for name in steps])


def _clean(texts: Iterable[str], functions: list[Callable[[str], str]]) -> Iterator[str]:
    for text in texts:
        for function in functions:
            text = function(text)
        if text:
            yield text
