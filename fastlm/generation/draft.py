"""Guesses at the tokens to come, for the model to confirm many at a time (speculative decoding).

A guess costs nothing in quality: the decoder samples at every guessed place from the model's own logits with that
place's own random numbers, and keeps guesses only as far as they are what it would have drawn.

Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, for drafts by a smaller model; Saxena, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding, for those from the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Draft", "PromptLookup"]


class Draft(Protocol):
    """What makes guesses for one row."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow `ids`; none where it has no idea.

        From call to call `ids` grows at its end alone.
        """
        ...


class PromptLookup:
    """Guesses that the text goes on as it did after the last place that looks like its end.

    As many tokens are guessed as agree before that place: the longer the likeness, the farther it is trusted.

    Args:
        match: how many tokens must agree for a place to look like the end; of several places the one whose tokens
            before agree longest counts, the latest of equals.
    """

    _MOST_PLACES = 16
    _LONGEST = 32

    def __init__(self, match: int = 3) -> None:
        if match < 1:
            raise ValueError(f"match: {match} is not an integer >= 1")
        self._match = match
        self._places: dict[tuple[int, ...], list[int]] = {}  # where what follows each run of `match` tokens stands
        self._read = 0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """The tokens that followed the like of the text's end."""
        for end in range(max(self._read, self._match), len(ids)):
            self._places.setdefault(tuple(ids[end - self._match : end]), []).append(end)
        self._read = len(ids)
        places = self._places.get(tuple(ids[-self._match :]), [])[-self._MOST_PLACES :]
        if not places:
            return []
        agreement, place = max((self._agreement(ids, at), at) for at in places)
        return list(ids[place : place + min(count, agreement)])

    def _agreement(self, ids: Sequence[int], place: int) -> int:
        """How many tokens before `place` agree with those before the end, up to a limit."""
        limit = min(place, self._LONGEST)
        length = self._match
        while length < limit and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        return length
