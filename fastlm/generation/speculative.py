"""When to guess: the clock decides whether confirming guesses beats plain steps."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """Decides by the clock whether guessing pays, so that a text that defies guessing costs little.

    After a guess that did not pay there is a pause, twice as long each time; one that paid ends the caution.
    """

    _FIRST_PAUSE = 8

    def __init__(self) -> None:
        self._plain = 0.0  # seconds a token, the smallest seen: what a step costs when nothing disturbs it
        self._pause = self._FIRST_PAUSE
        self.waiting = 0
        """Tokens until the next guess."""

    def plain(self, seconds: float, tokens: int) -> None:
        """Plain steps have given so many tokens."""
        each = seconds / tokens
        self._plain = min(self._plain or each, each)
        self.waiting = max(0, self.waiting - tokens)

    def guessed(self, seconds: float, tokens: int) -> None:
        """A step with guesses has given so many tokens, the one that any step gives among them."""
        if seconds <= tokens * self._plain:
            self._pause = self._FIRST_PAUSE
        elif tokens < 2 or (self._plain and seconds > 1.5 * tokens * self._plain):
            self.waiting = self._pause
            self._pause *= 2
