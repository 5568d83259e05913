"""The steps of running requests: several at a time where nothing can end a request before, or guessed ahead."""

from __future__ import annotations

import time
from collections.abc import Collection

from torch import Tensor

from fastlm.generation.capture import Refused
from fastlm.generation.draft import DraftEnded
from fastlm.generation.lanes import Request
from fastlm.generation.recordings import Recording, Recordings
from fastlm.generation.speculative import Pace
from fastlm.models.base import CausalLM, State
from fastlm.nn.state import KVCache
from fastlm.reference.sample import BadLogits

__all__ = ["Steps"]


class Steps:
    """Samples the next tokens of requests whose prompts have been read.

    Args:
        model, state, recordings: what a step runs, and how.
        stop_ids: tokens that end a request.
        max_length: tokens a request can hold, or None.
    """

    def __init__(
        self,
        model: CausalLM,
        state: State,
        recordings: Recordings,
        stop_ids: Collection[int],
        max_length: int | None,
    ) -> None:
        self._model, self._state, self._recordings = model, state, recordings
        self._stop_ids, self._max_length = stop_ids, max_length
        self.pace = Pace()

    def advance(self, running: list[Request], ahead: int) -> list[tuple[list[int], Tensor | None]]:
        """One or more steps of these requests: the tokens, and the logits [B, V] behind them where there are any."""
        if len(running) == 1 and running[0].draft is not None and isinstance(self._state, KVCache):
            guessed = self._guess(running[0])
            if guessed:
                return guessed
            ahead = min(ahead, 1 if running[0].guessing else self.pace.ahead)
        recording = self._recordings.filled(running, 1)
        if recording.captured is None:
            self._recordings.record(recording)
            return [(self._allowed(running, recording.lanes.tokens.tolist(), recording), recording.logits)]
        screening = self._recordings.screening
        ahead = min(ahead, screening.most_ahead(running) or ahead)
        limit = min(ahead, *(self._steps_left(request) for request in running))
        if any(request.params.logprobs for request in running):
            limit = 1
        start = time.perf_counter()
        steps = self.replay(recording, limit, self._stop_ids)
        seconds = time.perf_counter() - start
        self.pace.plain(seconds, len(steps))
        steps[-1] = self._allowed(running, steps[-1], recording)
        if recording.hidden is not None:
            screening.saw(recording.hidden)
        screening.took(running, seconds, steps=len(steps))
        return [(ids, recording.logits) for ids in steps]

    def _allowed(self, requests: list[Request], tokens: list[int], recording: Recording, last: int = 0) -> list[int]:
        """The tokens of a step, those at place `last` of what the requests read; where it went by a screen and one of
        them is a stop token too early, they are drawn from all logits instead."""
        early = [r for r, token in zip(requests, tokens, strict=True) if r.early and token in self._stop_ids]
        if recording.screen is None or not early:
            return tokens
        for request in early:
            request.stopping = True
        lanes = self._recordings.of(requests, 1, logits=True).lanes
        lanes.fill(requests, self._stop_ids)
        self._recordings.stale()
        assert recording.hidden is not None
        found: list[int] = lanes.sample(self._model.head(recording.hidden[:, last : last + 1]).flatten(0, 1)).tolist()
        return found

    def replay(self, recording: Recording, times: int = 1, stops: Collection[int] = ()) -> list[list[int]]:
        """Runs a recorded step: `Captured.run`. BadLogits: it says what is wrong with the logits."""
        assert recording.captured is not None
        try:
            return recording.captured.run(times, stops)
        except Refused:
            self._recordings.stale()
            logits = recording.logits
            if logits is None:
                assert recording.hidden is not None
                logits = self._model.head(recording.hidden).flatten(0, 1)
            recording.lanes.sample(logits)
            raise

    def _guess(self, request: Request) -> list[tuple[list[int], Tensor | None]]:
        """Guessed tokens that proved right and the one after them; nothing where a plain step is the better choice."""
        count, left = request.params.draft_tokens, self._steps_left(request)
        room = self._max_length is None or len(request.ids) + count <= self._max_length
        if left < 2 or not room or self._recordings.why_not is not None:
            request.guessing = False  # so that plain steps need not come one by one
            return []
        request.guessing = request.guessing and self.pace.goes_on(count)
        if not request.guessing and self.pace.waiting:
            return []
        recorded = self._recordings.of([request], count + 1).captured is not None
        try:
            guesses, start = self._guesses(request, count, recorded)
            if not guesses:
                return []
            recording = self._recordings.filled([request], count + 1, guesses)
            if recorded:
                tokens = self.replay(recording)[0]
            else:
                self._recordings.record(recording)
                tokens = recording.lanes.tokens.tolist()
        except (BadLogits, DraftEnded, Refused):
            # The draft's logits, or those behind a wrong guess. If the text's own are no better, a plain step says so.
            request.draft = None
            self._state.lengths[request.slot] = len(request.ids) - 1
            self._recordings.stale()
            return []
        right = 0
        while right < len(guesses) and tokens[right] == guesses[right] and tokens[right] not in self._stop_ids:
            right += 1
        right = min(right, left - 1)
        # The step has appended the last token and all guesses; what follows a wrong one is forgotten.
        self._state.lengths[request.slot] -= count - right
        self._recordings.stale()
        seconds = time.perf_counter() - start
        if recorded and left > count:
            self.pace.guessed(seconds, right + 1, first=not request.guessed)
        request.guessed = True
        logits = recording.logits
        if recording.hidden is not None:
            self._recordings.screening.saw(recording.hidden[:, : right + 1])
        self._recordings.screening.took([request], seconds, count + 1)
        tokens[right : right + 1] = self._allowed([request], tokens[right : right + 1], recording, right)
        return [
            ([token], None if logits is None else logits[at : at + 1]) for at, token in enumerate(tokens[: right + 1])
        ]

    def _guesses(self, request: Request, count: int, recorded: bool) -> tuple[list[int], float]:
        """What the draft proposes where rehearsals say that it pays, and when it began to."""
        draft, left = request.draft, request.params.max_new_tokens - request.generated
        assert draft is not None
        start = time.perf_counter()
        if not request.guessing:
            found = draft.rehearse(request.ids, request.prompt_length, count)
            self.pace.rehearsed(time.perf_counter() - start, count, found)
            request.guessing = self.pace.promising(count, left, recorded)
            start = time.perf_counter()
        if not request.guessing:
            return [], start
        wanted = min(count, self._steps_left(request) - 1)
        guesses = draft.propose(request.ids, wanted)[:wanted]
        # The recording is made once: for many guesses, and enough text to come.
        if not recorded and (len(guesses) < count or not self.pace.promising(count, left, recorded)):
            return [], start
        return (guesses if len(guesses) == wanted or self.pace.worth(len(guesses)) else []), start

    def _steps_left(self, request: Request) -> int:
        """Steps before something must be looked at: at least 1."""
        limit = request.params.max_new_tokens - request.generated
        if request.early:
            limit = request.params.min_new_tokens - request.generated
        return limit if self._max_length is None else min(limit, self._max_length + 1 - len(request.ids))
