"""When to guess: a budget of time decides whether confirming guesses beats plain steps."""

from __future__ import annotations

import math

__all__ = ["Pace"]


class Pace:
    """Decides by the clock whether guessing pays, so that a text that defies guessing costs next to nothing.

    Time is counted in plain steps. A round of guesses that gives n tokens for the time of m plain steps adds n - m to
    an account; every plain token adds a little. A round begins where the account could bear its failing, so the loss
    is never more than what plain tokens have earned and what the account held at first.
    """

    _EARNED = 0.02
    _AT_FIRST = 1.5
    _AT_MOST = 12.0  # so that a text that was easy and no longer is soon shows

    def __init__(self) -> None:
        self._plain = 0.0  # seconds a plain step takes, on average of late
        self._round = 0.0  # plain steps that a round takes, likewise
        self._account = self._AT_FIRST

    def plain(self, seconds: float, tokens: int) -> None:
        """Plain steps have given so many tokens."""
        each = seconds / tokens
        # A step that something else held up is not what a step costs.
        self._plain = min(1.5 * self._plain, 0.8 * self._plain + 0.2 * each) if self._plain else each
        self._account = min(self._AT_MOST, self._account + self._EARNED * tokens)

    def guessed(self, seconds: float, tokens: int) -> None:
        """A round of guesses has given so many tokens, the one that any step gives among them."""
        if not self._plain:
            return
        took = seconds / self._plain
        self._round = min(1.5 * self._round, 0.8 * self._round + 0.2 * took) if self._round else took
        self._account = min(self._AT_MOST, self._account + tokens - min(took, 1.5 * self._round))

    @property
    def waiting(self) -> int:
        """Plain tokens until the next round may begin; 0: it may now."""
        if not self._plain:
            return 2  # to know what they take; the first is recorded
        missing = max(0.0, self._round - 1.0) - self._account
        return math.ceil(missing / self._EARNED) if missing > 0 else 0
