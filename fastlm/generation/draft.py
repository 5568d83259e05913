"""Guesses at the tokens to come, for the model to confirm many at a time (speculative decoding).

A guess costs nothing in quality: the decoder samples at every guessed place from the model's own logits with that
place's own random numbers, and keeps guesses only as far as they are what it would have drawn.

Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, for drafts by a smaller model; Saxena, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding, for those from the text itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Draft", "DraftEnded", "PromptLookup", "Rehearsal", "common"]


class Rehearsal(NamedTuple):
    """How guesses would have done on text that is known by now.

    Attributes:
        tokens: of the text that it looked at.
        rounds: times it would have made guesses, going on behind the first wrong one. What the text's end cuts short,
            nothing being wrong so far, is a part of one.
        right: guesses before the first wrong one of their round, of all rounds.
        seconds: that the draft will take before its first real guess.
    """

    tokens: int = 0
    rounds: float = 0.0
    right: int = 0
    seconds: float = 0.0


class DraftEnded(Exception):
    """There will be no more guesses for this text: it is longer than the draft can read."""


class Draft(Protocol):
    """What makes guesses for one row. Both methods may raise `DraftEnded`."""

    def rehearse(self, ids: Sequence[int], prompt_length: int, count: int) -> Rehearsal:
        """What guessing `count` tokens at a time would have given in the text since the last rehearsal.

        Nothing is confirmed for it: it costs what the guesses cost, at most. Before it has shown that guesses pay,
        the step that confirms them is not recorded.
        """
        ...

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow `ids`; none where it has no idea.

        From call to call `ids` grows at its end alone. The next rehearsal begins here: how these guesses do is known.
        """
        ...


class PromptLookup:
    """Guesses that the text goes on as it did after the last place that looks like its end.

    As many tokens are guessed as agree before that place: the longer the likeness, the farther it is trusted.

    Args:
        ids: the beginning of the text, looked through at once and not with the first guess.
        match: how many tokens must agree for a place to look like the end; of several places the one whose tokens
            before agree longest counts, the latest of equals.
    """

    _MOST_PLACES = 16
    _LONGEST = 32
    _REHEARSED = 64  # tokens of the prompt

    def __init__(self, ids: Sequence[int] = (), match: int = 3) -> None:
        if match < 1:
            raise ValueError(f"match: {match} is not an integer >= 1")
        self._match = match
        self._places: dict[tuple[int, ...], list[int]] = {}  # where what follows each run of `match` tokens stands
        self._read = 0
        self._rehearsed: int | None = None
        self._index(ids)

    def rehearse(self, ids: Sequence[int], prompt_length: int, count: int) -> Rehearsal:
        """What the prompt's end and the text since would have given."""
        if self._rehearsed is None:
            self._rehearsed = max(self._match, prompt_length - self._REHEARSED)
        self._index(ids)
        first = at = self._rehearsed
        rounds = right = 0
        while at < len(ids):
            guesses = self._guesses(ids, at, count)
            found = common(guesses, ids[at : at + count])
            if guesses and at + found == len(ids) and found < len(guesses):
                break  # how it ends is not known yet
            rounds += bool(guesses)
            right += found
            at += found + 1
        self._rehearsed = at
        return Rehearsal(at - first, rounds, right)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """The tokens that followed the like of the text's end."""
        self._index(ids)
        self._rehearsed = len(ids)
        return self._guesses(ids, len(ids), count)

    def _index(self, ids: Sequence[int]) -> None:
        for end in range(max(self._read, self._match), len(ids)):
            self._places.setdefault(tuple(ids[end - self._match : end]), []).append(end)
        self._read = len(ids)

    def _guesses(self, ids: Sequence[int], end: int, count: int) -> list[int]:
        """Of what stands before `end` alone."""
        places = self._places.get(tuple(ids[max(0, end - self._match) : end]), [])
        places = places[: bisect_left(places, end)][-self._MOST_PLACES :]
        if not places:
            return []
        agreement, place = max((self._agreement(ids, at, end), at) for at in places)
        guesses = list(ids[place : min(place + min(count, agreement), end)])
        while len(guesses) < min(count, agreement):  # the text goes round: the guesses themselves are what comes next
            guesses.append(guesses[place - end])
        return guesses

    def _agreement(self, ids: Sequence[int], place: int, end: int) -> int:
        """How many tokens before `place` agree with those before `end`, up to a limit."""
        limit = min(place, self._LONGEST)
        length = self._match
        while length < limit and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
