"""Confirming guesses: one step that reads a row's last token and several guessed ones, and samples behind each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlm import ops
from fastlm.generation.batch import Batch
from fastlm.generation.capture import Captured
from fastlm.generation.draft import Draft

__all__ = ["Pace", "Speculation"]


class Pace:
    """Decides by the clock whether guessing pays, so that a text that defies guessing costs little.

    After a guess that did not pay there is a pause, twice as long each time; one that paid ends the caution.
    """

    _FIRST_PAUSE = 32

    def __init__(self) -> None:
        self._plain = 0.0  # seconds a token, the smallest seen: what a step costs when nothing disturbs it
        self._pause = self._FIRST_PAUSE
        self.waiting = 0  # tokens until the next guess

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


class Speculation:
    """One row of a batch, with `count` guesses at a time.

    Args:
        decode: reads a batch's ids [1, T], appends them to the state, and samples a token behind each: logits [T, V],
            tokens [T].
        batch: of one row.
        draft: makes the guesses.
        count: how many, at least 1.
    """

    def __init__(
        self, decode: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch, draft: Draft, count: int
    ) -> None:
        self.count = count
        self.draft = draft
        self.pace = Pace()
        self._decode = decode
        self._tokens = torch.zeros(count + 1, dtype=torch.int64)
        history = batch.history
        self._batch = Batch(
            batch.rows,
            batch.index,
            batch.ids.expand(1, count + 1).clone(),
            torch.zeros(count + 1, dtype=torch.int64),
            batch.sequences.expand(count + 1).clone(),
            batch.prompt_lengths.expand(count + 1).clone(),
            None if history is None else history.expand(count + 1, -1),
        )
        self._captured: Captured | None = None

    def forget(self) -> None:
        """Records anew the next time: something that the step was given has changed."""
        self._captured = None

    def confirm(self, last: int, position: int, guesses: Sequence[int]) -> tuple[list[int], Tensor]:
        """The tokens that follow, the guesses being right as far as they agree with them; at least one.

        Leaves the guesses in the state, of which the caller has to forget those that were wrong.

        Args:
            last: the row's last token, not yet in the state.
            position: of the token after it.
            guesses: 1 to `count` tokens.

        Returns:
            1 to len(guesses) + 1 tokens, and their logits [1 to len(guesses) + 1, V].

        Raises:
            CaptureError, Refused: as `Captured`.
        """
        start = time.perf_counter()
        guesses = list(guesses)
        batch = self._batch
        padded = [*guesses, *[last] * (self.count - len(guesses))]
        batch.ids[0] = torch.tensor([last, *padded])
        batch.positions.copy_(torch.arange(position, position + self.count + 1))
        if batch.history is not None:
            batch.history[0, position : position + self.count] = torch.tensor(padded)
        first = self._captured is None
        if first:
            self._captured = Captured(self._step, self._tokens)
            tokens: list[int] = self._tokens.tolist()
        else:
            assert self._captured is not None
            tokens = self._captured.run(1)[0]
        right = 0
        while right < len(guesses) and tokens[right] == guesses[right]:
            right += 1
        if not first:  # recording is slower than replaying
            self.pace.guessed(time.perf_counter() - start, right + 1)
        return tokens[: right + 1], self._captured.result[: right + 1]

    def _step(self) -> Tensor:
        logits, tokens = self._decode(self._batch)
        ops.offset(tokens, out=self._tokens)
        return logits
