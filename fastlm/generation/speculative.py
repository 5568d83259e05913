"""When to guess: a budget of time decides whether confirming guesses beats plain steps."""

from __future__ import annotations

import math

from fastlm.generation.draft import Rehearsal

__all__ = ["Pace"]


class Pace:
    """Decides by the clock whether guessing pays, so that a text that defies guessing costs next to nothing.

    Time is counted in plain steps. A round of guesses that gives n tokens for the time of m plain steps adds n - m to
    an account; every plain token adds a little. A round begins where the account could bear its failing, so the loss
    is never more than what plain tokens have earned and what the account held at first.

    What comes before the first round, recording the step that confirms guesses above all, takes longer than that. It
    waits for rehearsals, in which guesses are held against tokens that plain steps have given. The account pays for
    them likewise.
    """

    _EARNED = 0.01
    _AT_FIRST = 0.8
    _AT_MOST = 12.0  # so that a text that was easy and no longer is soon shows
    _MOST_REHEARSAL = 4.0  # what takes longer has been held up by something else
    _GUESS = 1 / 3  # what a guess is taken to cost before that is known, made and confirmed
    _RECORDING = 5.0  # and recording
    _DUE = 2.5
    _EVIDENCE = 1.5  # saved in rehearsals, below which it may be chance

    def __init__(self) -> None:
        self._plain = 0.0  # seconds a plain step takes, on average of late
        self._round = 0.0  # plain steps that a round takes, likewise
        self._rehearsal = 0.0  # and those of the last rehearsal
        self._account = self._AT_FIRST
        self._saved = 0.0  # steps that guessing would have saved
        self._among = 0  # in so many tokens
        self._setup = 0.0  # steps before the draft's first round

    def join(self) -> None:
        """Another text begins: what rehearsals have shown was of the last."""
        self._saved, self._among, self._rehearsal = 0.0, 0, 0.0

    def plain(self, seconds: float, tokens: int) -> None:
        """Plain steps have given so many tokens."""
        each = seconds / tokens
        # A step that something else held up is not what a step costs.
        self._plain = min(1.5 * self._plain, 0.8 * self._plain + 0.2 * each) if self._plain else each
        self._account = min(self._AT_MOST, self._account + self._EARNED * tokens)

    def rehearsed(self, seconds: float, count: int, found: Rehearsal) -> None:
        """Guesses of `count` tokens have been held against known text."""
        if not self._plain or not found.tokens:
            return
        self._rehearsal = min(self._MOST_REHEARSAL, seconds / self._plain)
        self._account -= self._rehearsal
        self._setup = found.seconds / self._plain
        self._among += found.tokens
        self._saved += found.right - found.rounds * count * self._GUESS
        if self._saved <= 0:
            self._saved, self._among = 0.0, 0

    def promising(self, left: int, recorded: bool) -> bool:
        """Whether the rest of the text, `left` tokens at most, is likely to give back what comes before a round."""
        setup = self._setup + (0.0 if recorded else self._RECORDING)
        return self._saved >= self._EVIDENCE and self._saved / self._among * left > setup

    def begun(self, seconds: float, tokens: int) -> None:
        """The first round, in which all is prepared, has given so many tokens."""
        if not self._plain:
            return
        # What rehearsals have saved stands for what is to come, and after all this some rounds are due.
        self._account = max(self._DUE, self._account + self._saved + tokens - seconds / self._plain)
        self._rehearsal = 0.0

    def guessed(self, seconds: float, tokens: int) -> None:
        """A round of guesses has given so many tokens, the one that any step gives among them."""
        if not self._plain:
            return
        took = seconds / self._plain
        self._round = min(1.5 * self._round, 0.8 * self._round + 0.2 * took) if self._round else took
        self._account = min(self._AT_MOST, self._account + tokens - min(took, 1.5 * self._round))

    @property
    def waiting(self) -> int:
        """Plain tokens until the next round or rehearsal may begin; 0: it may now."""
        if not self._plain:
            return 2  # to know what they take; the first is recorded
        missing = max(self._rehearsal, self._round - 1.0) - self._account
        return math.ceil(missing / self._EARNED) if missing > 0 else 0
