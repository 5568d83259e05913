"""The decode steps of an engine, recorded once for each size of batch, and the tensors that say whose they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastlm.generation.capture import Captured, CaptureError
from fastlm.generation.graph import Graph, records, sampling_device
from fastlm.generation.lanes import Lanes, Request
from fastlm.generation.prompts import ShortPrompts
from fastlm.generation.screening import Screening
from fastlm.kernels import native
from fastlm.models.base import CausalLM, State
from fastlm.nn.state import KVCache
from fastlm.ops import greedy, offset
from fastlm.ops.greedy import Screen
from fastlm.ops.registry import choosing

__all__ = ["Recording", "Recordings"]


@dataclass
class Recording:
    """A step for one size of batch: its tensors, what was recorded, and whom the tensors were filled with last.

    Attributes:
        screen: by which it makes tokens of hidden states, and no logits; None: it makes logits.
        hidden: the last step's, [B, width, d]; None on a GPU.
        logits: [B * width, V].
    """

    lanes: Lanes
    screen: Screen | None = None
    captured: Captured | Graph | None = None
    hidden: Tensor | None = None
    logits: Tensor | None = None
    requests: tuple[Request, ...] = ()


class Recordings:
    """The steps of a model over a state.

    Args:
        model, state: what a step runs.
        stop_ids: tokens that end a request.
        max_length: tokens a request can hold, or None.
        capture: record steps where that is possible.
    """

    why_not: str | None
    """Why steps run op by op; None where they are replayed, or none has been tried yet."""

    def __init__(
        self,
        model: CausalLM,
        state: State,
        stop_ids: Collection[int],
        max_length: int | None,
        *,
        capture: bool,
    ) -> None:
        self.why_not = None if capture else "capture=False"
        self._model, self._state = model, state
        self._stop_ids, self._max_length = stop_ids, max_length
        self._sampling = sampling_device(model.device)
        self._samples_on_device = self._sampling == model.device
        self._all: dict[tuple[int, int, bool, bool, Screen | None], Recording] = {}
        self.screening = Screening(model)
        self._screen: Screen | None = None
        self._current: Recording | None = None  # the one whose tensors hold the requests' present state
        self._prompts = None
        if not records(model.device) and isinstance(state, KVCache):
            self._prompts = ShortPrompts(model, state)

    def stale(self) -> None:
        """The requests have changed otherwise than by the step that was `filled` last."""
        self._current = None

    def of(self, requests: Sequence[Request], width: int, *, logits: bool = False) -> Recording:
        """The step for so many requests with options like theirs, `width` tokens each; `logits`: that makes them."""
        if self._screen is not (screen := self.screening.screen):
            self._screen = screen
            self._all = {key: kept for key, kept in self._all.items() if kept.screen is None}
        screen = self.screening.of(requests, width) if self.why_not is None and not logits else None
        penalised = any(request.params.penalised for request in requests)
        biased = screen is None and any(r.bias is not None or r.params.min_new_tokens for r in requests)
        key = (len(requests), width, penalised, biased, screen)
        if key not in self._all:
            history = 0
            if penalised:
                longest = max(len(r.ids) + r.params.max_new_tokens for r in requests) + width
                history = longest if self._max_length is None else self._max_length + width
            self._all[key] = Recording(
                Lanes(
                    len(requests),
                    width,
                    history=history,
                    biased=self._model.config.vocab_size if biased else 0,
                    device=self._model.device,
                    sampling=self._sampling,
                ),
                screen,
            )
        return self._all[key]

    def filled(self, requests: Sequence[Request], width: int, guesses: Sequence[int] = ()) -> Recording:
        """The step for these requests, its tensors filled with their state."""
        recording = self.of(requests, width)
        if self._current is not recording or recording.requests != tuple(requests):
            recording.lanes.fill(requests, self._stop_ids, guesses)
            recording.requests = tuple(requests)
            self._current = recording
        return recording

    def read(self, ids: Sequence[int], row: int) -> tuple[Tensor, Tensor] | None:
        """Reads a few tokens by a recorded step, if there is one: `ShortPrompts.read`."""
        if self._prompts is None or self.why_not is not None or self._obstacle() is not None:
            return None
        return self._prompts.read(ids, row)

    def record(self, recording: Recording) -> None:
        """Runs a step, and records it if it can be."""

        lanes, screen = recording.lanes, recording.screen

        def forward() -> Tensor:
            recording.hidden = self._model.hidden(lanes.ids, self._state, lanes.index)
            return self._model.head(recording.hidden).flatten(0, 1)

        def take(tokens: Tensor) -> None:
            offset(tokens, out=lanes.tokens)
            if lanes.width == 1:
                lanes.feed(tokens)

        def draw(logits: Tensor) -> None:
            take(lanes.sample(logits))

        def step() -> Tensor:
            logits = forward()
            draw(logits)
            return logits

        def screened() -> None:
            recording.hidden = self._model.hidden(lanes.ids, self._state, lanes.index)
            assert screen is not None
            take(greedy(recording.hidden, screen.weight, screen.bias, screen=screen).view(-1))

        def snapshot() -> Callable[[], None]:
            state, inputs = self._state.snapshot(), lanes.snapshot()

            def restore() -> None:
                state()
                inputs()

            return restore

        if self.why_not is None:
            self.why_not = self._obstacle()
        if self.why_not is None:
            restore = snapshot()  # the step may have run when it turns out that it can't be recorded
            try:
                device = self._model.device
                if not records(device):
                    recording.captured = Captured(step if screen is None else screened, lanes.tokens)
                elif self._samples_on_device:
                    recording.captured = Graph(device, step, lanes.tokens, snapshot)
                else:
                    recording.captured = Graph(device, forward, lanes.tokens, snapshot, after=draw)
                recording.logits = recording.captured.result
                return
            except CaptureError as error:
                self.why_not = str(error)
                restore()
        if screen is None:
            recording.logits = step()
        else:
            screened()

    def _obstacle(self) -> str | None:
        device = self._model.device
        if not records(device):
            if device.type != "cpu":
                return f"the model is on {device}"
            if native.CPU.module is None:
                return native.CPU.error
        return None if choosing() else "a backend is forced"
