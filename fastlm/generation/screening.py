"""When an engine's greedy steps find the largest logit by `ops.greedy`, leaving most of the output layer unread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import ops
from fastlm.generation.lanes import Request
from fastlm.models.base import CausalLM
from fastlm.ops.greedy import Screen

__all__ = ["Screening"]

_TOKENS = 512  # greedy ones before there is a screen: to make it takes as long as some 30 tokens do
_SEEN = 384  # hidden states that are kept until then, of which a quarter may be of one prompt
_AHEAD = 4  # steps at a time meanwhile: only the last one's hidden state is there to be kept
_CALLS = 128  # between two looks at whether it pays


class Screening:
    """The screen of a model's head, once enough greedy tokens have been generated for it to pay.

    It is made of hidden states that the model has had, and given up where it does not spare enough.
    """

    def __init__(self, model: CausalLM) -> None:
        self.screen: Screen | None = None
        self._model = model
        self._head = model.plain_head()
        if self._head is None or Screen.why_not(*self._head) is not None:
            self._head = None
        self._seen: list[Tensor] = []
        self._tokens = 0

    @staticmethod
    def greedy(requests: Sequence[Request]) -> bool:
        """Whether nothing but the largest logit is asked for."""
        return not any(
            r.params.temperature
            or r.params.penalised
            or r.bias is not None
            or r.params.min_new_tokens
            or r.params.logprobs
            for r in requests
        )

    def serves(self, requests: Sequence[Request], width: int) -> bool:
        """Whether a step for these requests can go by the screen, and gains by it."""
        return self.screen is not None and len(requests) * width <= self.screen.most_rows and self.greedy(requests)

    def most_ahead(self, requests: Sequence[Request]) -> int | None:
        """Steps to take at a time while hidden states are collected; None: as many as wanted."""
        return _AHEAD if self._collecting and self.greedy(requests) else None

    @property
    def _collecting(self) -> bool:
        return self._head is not None and self.screen is None

    def saw(self, hidden: Tensor) -> None:
        """Hidden states [..., d], of a prompt or a step."""
        room = _SEEN - sum(map(len, self._seen))
        if not self._collecting or room <= 0:
            return
        states = hidden.detach().flatten(0, -2)
        if states.dtype != torch.float32:
            self._head = None
            return
        self._seen.append(states[-min(room, _SEEN // 4) :].clone())

    def took(self, requests: Sequence[Request], tokens: int) -> None:
        """So many tokens were generated for them. Makes the screen when it is time; drops it where it is no gain."""
        if self.screen is not None:
            calls = int(self.screen.counts[1])
            if calls >= _CALLS:
                if not self.screen.pays:
                    self.screen = self._head = None
                else:
                    self.screen.counts.zero_()
        elif self._collecting and self.greedy(requests):
            self._tokens += tokens
            if self._tokens >= _TOKENS and self._seen:
                assert self._head is not None
                try:
                    self.screen = Screen(*self._head, torch.cat(self._seen))
                except ValueError:  # weights that are not finite
                    self._head = None
                self._seen = []

    def step(self, hidden: Tensor) -> Tensor:
        """The tokens [n] for hidden states [..., d] of n tokens. BadLogits: as `ops.greedy`."""
        assert self.screen is not None
        return ops.greedy(hidden, self.screen.weight, self.screen.bias, screen=self.screen).view(-1)
