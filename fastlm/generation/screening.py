"""When an engine's greedy steps find the largest logit by `ops.greedy`, leaving most of the output layer unread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastlm.generation.lanes import Request
from fastlm.models.base import CausalLM
from fastlm.ops.greedy import Screen
from fastlm.ops.quantized import QuantizedTensor

__all__ = ["Head", "Screening", "heads"]

_TIMES = 50.0  # as long as making the screen have greedy steps to take before: so no text loses more than a fiftieth
_GUESS = 3e-9  # seconds that this is taken to need for a weight, until a fifth of the time it was measured
_SEEN = 384  # hidden states that are kept until then, of which a quarter may be of one prompt
_FEWEST = 128  # to make a screen of
_LOOK = 0.01  # seconds of steps between two looks at the hidden state, which cost less than a hundredth of it
_CALLS = 128  # between two looks at whether it pays


class Head:
    """What all engines of a model know of its output layer: how long greedy steps have taken, states, the screen."""

    def __init__(self, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self.made_for = self.version
        self.screen: Screen | None = None
        self.refused = False  # it does not spare enough, or cannot be made
        self.seen: list[Tensor] = []
        self.count = 0  # of these
        self.seconds = 0.0
        rows, columns = self.weight.shape
        self.cost, self._measured = _GUESS * rows * columns, False

    @property
    def version(self) -> list[int]:
        """Changes when somebody writes to the weight or the bias."""
        tensors = [t for t in (self.weight, self.bias) if isinstance(t, Tensor)]
        return [n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version)]

    @property
    def collecting(self) -> bool:
        return self.screen is None and not self.refused

    def check(self) -> None:
        """Forgets everything where the weights are no longer those that it is of."""
        if self.version != self.made_for:
            with self.lock:
                self._begin()

    @property
    def pending(self) -> bool:
        """Whether greedy steps have been taken, and there will be a screen if they go on."""
        return self.collecting and self.seconds > 0

    @property
    def spared(self) -> int:
        """Bytes that a step by the screen reads fewer than one by the weight, the few rows it looks at not counted."""
        if self.screen is None:
            return 0
        weight = self.weight
        return (weight.data if isinstance(weight, QuantizedTensor) else weight).nbytes - self.screen.nbytes

    def spent(self, seconds: float) -> None:
        """Greedy steps have taken so long. Makes the screen when it is time, unless another thread does already."""
        if not self.collecting or not self.lock.acquire(blocking=False):
            return
        try:
            self.seconds += seconds
            if not self.collecting or self.count < _FEWEST:
                return
            if not self._measured and self.seconds >= _TIMES / 5 * self.cost:
                self.cost, self._measured = Screen.seconds(self.weight, torch.cat(self.seen)), True
            if self._measured and self.seconds >= _TIMES * self.cost:
                self.screen = Screen(self.weight, self.bias, torch.cat(self.seen))
                self.seen = []
        except ValueError:  # weights that are not finite
            self.refused, self.seen = True, []
        finally:
            self.lock.release()


_HEADS: WeakKeyDictionary[CausalLM, Head] = WeakKeyDictionary()
_LOOKING = threading.Lock()


def heads() -> list[Head]:
    """Of all models that there are engines of, or were."""
    with _LOOKING:
        return list(_HEADS.values())


def _head_of(model: CausalLM) -> Head | None:
    found = model.plain_head()
    if found is None or Screen.why_not(*found) is not None:
        return None
    with _LOOKING:
        head = _HEADS.get(model)
        if head is None or head.weight is not found[0] or head.bias is not found[1]:
            head = _HEADS[model] = Head(*found)
        return head


class Screening:
    """An engine's part in the screen of its model's head: made of hidden states that the model has had, once greedy
    steps have taken long enough for it to pay, and given up where it does not spare enough."""

    def __init__(self, model: CausalLM) -> None:
        self._head = _head_of(model)
        self._shared: Screen | None = None
        self._own: Screen | None = None  # of the same, with counts of its own
        self._step = 0.0  # seconds that one takes

    @property
    def screen(self) -> Screen | None:
        """What there is now."""
        head = self._head
        if head is None:
            return None
        head.check()
        shared = None if head.refused else head.screen
        if shared is not self._shared:
            self._shared, self._own = shared, None if shared is None else shared.share()
        return self._own

    @staticmethod
    def greedy(requests: Sequence[Request]) -> bool:
        """Whether nothing but the largest logit is asked for. A stop token that comes too early is found out then."""
        return not any(
            r.params.temperature or r.params.penalised or r.bias is not None or r.params.logprobs or r.stopping
            for r in requests
        )

    def of(self, requests: Sequence[Request], width: int) -> Screen | None:
        """The screen by which a step for these requests can go, gaining by it."""
        screen = self.screen
        return screen if screen is not None and self._could_serve(requests, width) else None

    def _could_serve(self, requests: Sequence[Request], width: int) -> bool:
        head = self._head
        return head is not None and len(requests) * width <= Screen.most_rows(head.weight) and self.greedy(requests)

    @property
    def _collecting(self) -> bool:
        return self._head is not None and self._head.collecting

    def most_ahead(self, requests: Sequence[Request]) -> int | None:
        """Steps to take at a time while hidden states are collected, the last one's being there; None: any."""
        if not self._collecting or not self._could_serve(requests, 1):
            return None
        assert self._head is not None
        if self._head.count >= _SEEN:
            return None
        return max(1, round(_LOOK / self._step)) if self._step else 1

    def saw(self, hidden: Tensor) -> None:
        """Hidden states [..., d], of a prompt or a step."""
        head = self._head
        if head is None or not head.collecting or head.count >= _SEEN:
            return
        states = hidden.detach().flatten(0, -2)
        if states.dtype != torch.float32:
            self._head = None
            return
        with head.lock:
            states = states[-min(max(0, _SEEN - head.count), _SEEN // 4) :].clone()
            head.seen.append(states)
            head.count += len(states)

    def took(self, requests: Sequence[Request], seconds: float, width: int = 1, steps: int = 0) -> None:
        """So long went by for steps `width` tokens wide, `steps` if plain. Drops a screen that is no gain."""
        self._step = seconds / steps if steps else self._step
        if self._own is not None and int(self._own.counts[1]) >= _CALLS:
            if not self._own.pays and self._head is not None:
                self._head.refused, self._head.screen = True, None
            self._own.counts.zero_()
        elif self._collecting and self._could_serve(requests, width):
            assert self._head is not None
            self._head.spent(seconds)
