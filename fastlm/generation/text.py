"""From tokens to text as they come: whole UTF-8 characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

__all__ = ["TextAssembler"]


class TextAssembler:
    """Turns one row's tokens into text that can be shown at once.

    `push` returns what is new and certain: bytes of an unfinished character wait for the rest, and a tail that could be
    the beginning of a stop string waits until it is or isn't one. Invalid UTF-8 becomes U+FFFD.

    Args:
        token_bytes: the bytes of a token.
        stop: stop strings; the text ends before the first that occurs.
        min_tokens: stop strings that are complete before this many tokens are ordinary text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._tokens = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain. Sets `stopped` when a stop string is complete."""
        self._tokens += 1
        return self._advance(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        if not self._stop:
            text, self._held = self._held, ""
            return text
        if self._tokens >= self._min_tokens:
            found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
            if found:
                text, self._held = self._held[: min(found)], ""
                self.stopped = True
                return text
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
