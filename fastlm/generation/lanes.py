"""The requests that are decoded together, as tensors that a decode step reads and updates in place.

A recorded step keeps the addresses of these tensors, so one recording serves whatever requests they are filled with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm import ops
from fastlm.generation.draft import Draft
from fastlm.generation.params import SamplingParams

__all__ = ["Lanes", "Request", "dense_bias"]

_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(eq=False)
class Request:
    """One sequence being generated.

    Attributes:
        number: what its tokens carry as `Token.row`.
        ids: the prompt and what has been generated.
        params: with the seed filled in.
        sequence: of its random numbers.
        bias: [V] or None, what `params.logit_bias` says.
        slot: its row of the state; -1 while it waits.
        guessing: whether rehearsals have shown that guessing its tokens pays, and too much has not failed since.
        stopping: a stop token came out too early once, so that all logits are needed from then on.
        guessed: whether its draft has had its first round, in which all is prepared.
    """

    number: int
    ids: list[int]
    params: SamplingParams
    sequence: int
    bias: Tensor | None
    draft: Draft | None = None
    slot: int = -1
    guessing: bool = False
    guessed: bool = False
    stopping: bool = False
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def generated(self) -> int:
        """New tokens so far."""
        return len(self.ids) - self.prompt_length

    @property
    def early(self) -> bool:
        """Whether stop tokens are out of the question yet."""
        return self.generated < self.params.min_new_tokens


class Lanes:
    """Room for `count` requests, each with `width` tokens a step: its last one and guesses.

    Attributes:
        ids: int64 [count, width], the tokens to read, on the model's device.
        index: int64 [count], the requests' rows of the state, on that device too.
        tokens: int64 [count * width], what the last step sampled.

    Args:
        history: tokens to make room for where the sampler wants them; 0: none.
        biased: whether logits have biases, and of how many tokens; 0: none.
        device: of the model.
        sampling: the device that samples, on which all others are; default: the CPU.
    """

    def __init__(
        self,
        count: int,
        width: int,
        *,
        history: int,
        biased: int,
        device: torch.device,
        sampling: torch.device | None = None,
    ) -> None:
        sampling = sampling or torch.device("cpu")

        def integers(*shape: int, where: torch.device = sampling) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=where)

        places = count * width
        self.width = width
        self.ids, self.index = integers(count, width, where=device), integers(count, where=device)
        self.tokens = integers(places)
        self._positions, self._ends, self._prompts = (integers(places) for _ in range(3))
        self._top_k, self._seeds, self._sequences = (integers(places) for _ in range(3))
        self._reals = {name: torch.zeros(places, dtype=torch.float64, device=sampling) for name in _REALS}
        self._history = integers(count, history) if history else None
        self._bias = torch.zeros(places, biased, device=sampling) if biased else None
        self._sampling = sampling
        self._options_of: list[object] = []  # whose options the tensors hold
        # Filled on the host, and then moved tensor by tensor instead of number by number.
        self._staged: Lanes | None = None
        if device.type != "cpu":
            self._staged = Lanes(count, width, history=history, biased=biased, device=torch.device("cpu"))

    def fill(self, requests: Sequence[Request], stop_ids: Collection[int], guesses: Sequence[int] = ()) -> None:
        """Takes these requests' state over; guesses (of a single request) are padded with its last token."""
        if self._staged is not None:
            self._staged.fill(requests, stop_ids, guesses)
            for mine, staged in zip(self._tensors(), self._staged._tensors(), strict=True):
                mine.copy_(staged)
            return
        width = self.width
        of: list[object] = [stop_ids, *((request, request.slot, request.early) for request in requests)]
        if self._options_of != of:
            self._options_of = []
            for lane, request in enumerate(requests):
                self._take_options(lane, request, stop_ids)
            self._options_of = of
        rows = [[r.ids[-1], *guesses, *[r.ids[-1]] * (width - 1 - len(guesses))] for r in requests]
        places = [len(request.ids) + at for request in requests for at in range(width)]
        self.ids.copy_(torch.tensor(rows))
        self._positions.copy_(torch.tensor(places))
        if self._history is not None:
            longest = self._history.shape[1]
            for lane, (request, row) in enumerate(zip(requests, rows, strict=True)):
                known = [*request.ids, *row[1:]]
                self._history[lane, : len(known)] = torch.tensor(known)
            self._ends.copy_(self._positions + torch.arange(len(requests)).repeat_interleave(width) * longest)

    def _take_options(self, lane: int, request: Request, stop_ids: Collection[int]) -> None:
        """What stays the same from one `fill` for a request to the next."""
        params, places = request.params, slice(lane * self.width, (lane + 1) * self.width)
        self.index[lane] = request.slot
        self._prompts[places] = request.prompt_length
        self._top_k[places] = params.top_k
        self._seeds[places] = _signed(params.seed or 0)
        self._sequences[places] = _signed(request.sequence)
        for name, values in self._reals.items():
            values[places] = getattr(params, name)
        if self._bias is not None:
            self._bias[places] = 0.0 if request.bias is None else request.bias
            if request.early:
                self._bias[places, sorted(stop_ids)] = -torch.inf

    def _tensors(self) -> list[Tensor]:
        """All that `fill` sets."""
        found = [self.ids, self.index, self._positions, self._ends, self._prompts, self._top_k, self._seeds]
        found += [self._sequences, *self._reals.values()]
        return found + [tensor for tensor in (self._history, self._bias) if tensor is not None]

    def snapshot(self) -> Callable[[], None]:
        """A function that brings back what `feed` has changed since."""
        changing = [self.ids, self._positions, self._ends, *([] if self._history is None else [self._history])]
        copies = [tensor.clone() for tensor in changing]

        def restore() -> None:
            for tensor, copy in zip(changing, copies, strict=True):
                tensor.copy_(copy)

        return restore

    def sample(self, logits: Tensor) -> Tensor:
        """A token behind each token read: logits [count * width, V] to int64 [count * width]."""
        logits = logits.to(self._sampling)
        history: dict[str, Tensor] = {}
        if self._history is not None:
            # All guesses of a request see one history, each up to its own position.
            one = self._history if self.width == 1 else self._history.expand(self.width, -1)
            history = {"history": one, "history_lengths": self._positions, "prompt_lengths": self._prompts}
        return ops.sample(
            logits,
            top_k=self._top_k,
            seed=self._seeds,
            sequence=self._sequences,
            position=self._positions,
            logit_bias=self._bias,
            **self._reals,
            **history,
        )

    def feed(self, tokens: Tensor) -> None:
        """With `width` 1: makes the sampled tokens the next to be read."""
        if tokens.device.type != "cpu":
            tokens = tokens.clamp(min=0)  # a refusal is below 0; until it is seen, something has to be read
        ops.offset(tokens, out=self.ids.view(-1))
        if self._history is not None:
            ops.offset(self.tokens, out=self._history.view(-1), out_index=self._ends)
            ops.offset(self._ends, 1, out=self._ends)
        ops.offset(self._positions, 1, out=self._positions)


def _signed(number: int) -> int:
    """64 bits as int64 has them."""
    return (number + 2**63) % 2**64 - 2**63


def dense_bias(bias: Mapping[int, float] | None, vocab_size: int) -> Tensor | None:
    """The biases as a tensor [vocab_size]. ValueError: a token is outside the vocabulary."""
    if not bias:
        return None
    outside = [token for token in bias if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"logit_bias: token {outside[0]} is outside the vocabulary of {vocab_size}")
    dense = torch.zeros(vocab_size)
    dense[list(bias)] = torch.tensor(list(bias.values()))
    return dense
