"""When to guess: a budget of time decides whether confirming guesses beats plain steps."""

from __future__ import annotations

import math

from fastlm.generation.draft import Rehearsal

__all__ = ["Pace"]


class Pace:
    """Decides by the clock whether guessing pays, so that a text that defies guessing costs next to nothing.

    Time is counted in plain steps, whose cost is measured as they run. A text is *rehearsed* or *guessed*:

    - Rehearsals hold guesses against tokens that plain steps have given, and tell what rounds would have saved. They
      take about a hundredth of the time: one that took m steps, of which 4 count, is followed by 100 m plain tokens; by
      100 (m - n / 4) where n have been saved in rehearsals, and the text is long enough for that rate to pay.
    - A round confirms guesses. One that gives n tokens for the time of m plain steps adds n - m to an account, and
      every plain token adds a hundredth. A round begins while the account could bear its failing; where it could not,
      rehearsing goes on, and rounds begin again when four times what is missing has been saved in rehearsals. Then a
      single failure ends them, and more is missing the next time: what a text costs that keeps promising what it does
      not keep grows, but for the plain tokens' hundredth, with the root of its length.

    What comes before the first round, recording the step that confirms guesses above all, is not on the account: it
    waits until what rehearsals saved, over the rest of the text, is more than that takes. A text that begins where the
    last one's guesses paid, and all is recorded, is guessed at once: until one round has failed.
    """

    _EARNED = 0.01
    _AT_FIRST = 0.8
    _AT_MOST = 12.0  # so that a text that was easy and no longer is soon shows
    _OFTEN, _SELDOM = 8, 16  # plain steps at a time between rehearsals
    _MOST_REHEARSAL = 4.0  # what takes longer has been held up by something else
    _GUESS = 1 / 3  # what a guess is taken to cost before that is known, made and confirmed
    _RECORDING = 5.0  # and recording
    _EVIDENCE = 1.5  # saved in rehearsals, below which it may be chance
    _DOUBT = 16  # tokens in which nothing was saved, counted with those rehearsed
    _TRUST = 0.25  # of what rehearsals have saved may be lost, or go into the next
    _MARGIN = 1.5  # tokens beyond what plain steps would give that a round's guesses must promise
    _INHERITED = 1.5  # failing rounds that the next text's account can bear at most

    def __init__(self) -> None:
        self._plain = 0.0  # seconds a plain step takes, on average of late
        self._round = 0.0  # plain steps that a round takes, likewise
        self._account = self._AT_FIRST
        self._credit = 0.0  # so far below 0 the account may go
        self.join()

    def join(self) -> None:
        """Another text begins: what rehearsals have shown was of the last."""
        self._saved, self._among = 0.0, 0  # steps that rounds would have saved, in so many tokens
        self._setup = 0.0  # steps before the draft's first round
        self._rest = 0.0  # plain tokens until the next rehearsal
        self._futile = False  # the last one saved nothing
        if self._round:
            self._account = min(self._account, self._INHERITED * self._stake(0))

    def plain(self, seconds: float, tokens: int) -> None:
        """Plain steps have given so many tokens."""
        each = seconds / tokens
        # A step that something else held up is not what a step costs.
        self._plain = min(1.5 * self._plain, 0.8 * self._plain + 0.2 * each) if self._plain else each
        self._account = min(self._AT_MOST, self._account + self._EARNED * tokens)
        self._rest = max(0.0, self._rest - tokens)

    def rehearsed(self, seconds: float, count: int, found: Rehearsal) -> None:
        """Guesses of `count` tokens have been held against known text."""
        if not self._plain or not found.tokens:
            return
        took = seconds / self._plain
        held_up = max(1.0, took / self._MOST_REHEARSAL)
        self._rest = took / held_up / self._EARNED
        self._setup = found.seconds / self._plain / held_up
        self._among += found.tokens
        self._saved += found.right - found.rounds * self._stake(count)
        if self._saved <= 0:
            self._saved, self._among = 0.0, 0
        self._futile = not self._saved

    def promising(self, count: int, left: int, recorded: bool) -> bool:
        """Whether rehearsals have shown that rounds of `count` guesses are likely to pay in the rest of the text,
        `left` tokens at most."""
        self._credit = max(0.0, self._stake(count) - self._account)
        if recorded and self._round and not self._among and not self._futile:  # nothing is known of this text
            return not self._credit
        each = self._saved / (self._among + self._DOUBT)
        before = self._setup + (0.0 if recorded else self._RECORDING)
        if self._saved >= max(self._EVIDENCE, self._credit / self._TRUST):
            return each * left > before
        sooner = max(0.0, self._rest - self._TRUST * self._saved / self._EARNED)
        if each * (left - sooner) > before:
            self._rest = sooner
        return False

    def worth(self, guesses: int) -> bool:
        """Whether to confirm so few guesses, fewer than were asked for: all right, they pay for a round and more."""
        return guesses + 1 >= self._round + self._MARGIN

    def guessed(self, seconds: float, tokens: int, *, first: bool = False) -> None:
        """A round of guesses has given so many tokens, the one that any step gives among them. In a text's first round
        the draft may have had much to read: it counts as others did, or not at all."""
        if not self._plain or (first and not self._round):
            return
        took = self._round if first else seconds / self._plain
        self._round = min(1.5 * self._round, 0.8 * self._round + 0.2 * took) if self._round else took
        self._account = min(self._AT_MOST, self._account + tokens - min(took, 1.5 * self._round))

    def goes_on(self, count: int) -> bool:
        """Whether the account could bear it that another round of `count` guesses fails. Else rehearsals begin anew."""
        # What a round takes varies a little: that alone ends nothing.
        if self._account + 1.1 * self._credit + 0.2 >= self._stake(count):
            return True
        self.join()
        return False

    def _stake(self, count: int) -> float:
        """What a round loses that gives nothing beyond a plain step's token."""
        return max(0.0, self._round - 1.0) if self._round else count * self._GUESS

    @property
    def ahead(self) -> int:
        """Plain tokens to give before looking again. To interrupt a replay costs up to half a step: more of them where
        the last rehearsal saved nothing."""
        return max(self._SELDOM if self._futile else self._OFTEN, self.waiting)

    @property
    def waiting(self) -> int:
        """Plain tokens until the next rehearsal may begin; 0: it may now."""
        return math.ceil(self._rest) if self._plain else 2  # to know what they take; the first is recorded
