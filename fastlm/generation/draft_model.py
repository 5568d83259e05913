"""A small model that guesses what a large one is going to say.

Leviathan et al., 2022, https://arxiv.org/abs/2211.17192. The draft draws with the very random numbers that the large
model is going to draw with, which makes the same token likelier than chance; greedy text agrees most. It may be of
another family, an LSTM for a Transformer; or the large model itself with fewer bits (`quantized_copy`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlm.generation.draft import DraftEnded, Rehearsal, common
from fastlm.generation.engine import Engine
from fastlm.generation.lanes import Lanes, Request, dense_bias
from fastlm.generation.params import SamplingParams
from fastlm.models.base import CausalLM
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.reference.quantized import KINDS

__all__ = ["DRAFT_TOKENS", "ModelDraft", "quantized_copy"]

DRAFT_TOKENS = 7
"""How many to guess unless told: with the token before them a tile of eight rows."""


class ModelDraft:
    """Guesses by a model of the same vocabulary, for one request.

    Args:
        model: in eval mode.
        params: the request's options, its seed among them; greedy if None.
        sequence: of the request's random numbers.
        engine: of the model, as `ModelDraft.engine` makes one; None: one of its own. Several drafts can have one, which
            then reads a text anew whenever another one has had it.
    """

    _REHEARSAL = 48  # tokens that a rehearsal reads
    _REHEARSED = 10, 16  # and holds its guesses against, at least (to be believed for seven, all right) and at most
    _LIKELY = 0.4  # that a guess counts, all before it being right: what is less is not worth a step of the draft
    _FORGOTTEN = 0.1  # of what is known of former rounds, with each

    def __init__(
        self,
        model: CausalLM,
        params: SamplingParams | None = None,
        *,
        sequence: int = 0,
        engine: Engine | None = None,
    ) -> None:
        params = params or SamplingParams(temperature=0.0)
        # It never ends by itself, and does not guess in its turn.
        self._model = model
        self._params = replace(params, max_new_tokens=2**31, stop=(), logprobs=False, draft_tokens=0)
        self._sequence = sequence
        self._engine = engine or self.engine(model)
        self._room = self._engine.max_length
        self._number = -1
        self._rehearsed = 0
        self._read = 0
        self._guesses: list[int] = []  # of the last round, behind so many tokens as it had read
        self._right, self._wrong = 9.0, 0.5  # guesses so far; at first a good draft's

    @staticmethod
    def engine(model: CausalLM, max_length: int | None = None) -> Engine:
        """An engine for drafts by a model.

        Args:
            max_length: tokens it can read; None: its own context. Beyond, there are no guesses.

        Raises:
            ValueError: `max_length` is more than the model can have.
        """
        return Engine(model, rows=1, max_length=max_length or model.config.context_length, rewritable=True)

    def rehearse(self, ids: Sequence[int], prompt_length: int, count: int) -> Rehearsal:
        """What the model would have said at every place since, in one reading of the text's last part."""
        self._expect_room(len(ids))
        start = max(self._rehearsed, prompt_length, len(ids) - self._REHEARSED[1])
        width = len(ids) - start
        if width < self._REHEARSED[0]:
            return Rehearsal()
        self._rehearsed = len(ids)
        text = ids[-self._REHEARSAL :]
        began = time.perf_counter()
        drawn = self._drawn(text, ids, width)
        seconds = time.perf_counter() - began
        right = at = 0
        rounds = 0.0
        while at < width:
            found = common(drawn[at : at + count], ids[start + at : start + at + count])
            rounds += found / count if at + found == width else 1.0
            right += found
            at += found + 1
        return Rehearsal(width, rounds, right, seconds * (len(ids) - self._read) / len(text))

    def _expect_room(self, tokens: int) -> None:
        if self._room is not None and tokens > self._room:
            raise DraftEnded

    def _drawn(self, text: Sequence[int], ids: Sequence[int], width: int) -> list[int]:
        """What it draws at the last `width` places of ids, having read their end `text`."""
        params, model = self._params, self._model
        hidden = model.hidden(torch.tensor([text[:-1]], device=model.device), model.make_state(1, len(text)))
        bias = dense_bias(params.logit_bias, model.config.vocab_size)
        lanes = Lanes(
            1,
            width,
            history=len(ids) + width if params.penalised else 0,
            biased=0 if bias is None else len(bias),
            device=model.device,
        )
        lanes.fill([Request(0, list(ids[:-width]), params, self._sequence, bias)], (), ids[-width:-1])
        drawn: list[int] = lanes.sample(model.head(hidden[:, -width:])[0]).tolist()
        return drawn

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """What the model would say next, as far as that is likely enough to be right."""
        self._expect_room(len(ids) + count)
        count = min(count, self._worth_guessing(ids))
        self._rehearsed = self._read = len(ids)
        engine = self._engine
        if self._number in engine.active:
            engine.rewrite(self._number, ids)
        else:
            for other in engine.active:
                engine.cancel(other)
            self._number = engine.submit(ids, self._params, sequence=self._sequence)
        guesses: list[int] = []
        while len(guesses) < count and self._number in engine.active:
            guesses += [token.id for token in engine.step(count - len(guesses))]
        self._guesses = guesses
        return guesses

    def _worth_guessing(self, ids: Sequence[int]) -> int:
        """How many guesses are worth making, by how the last ones did: ids goes on from there."""
        if self._guesses and len(ids) > self._read:
            right = common(self._guesses, ids[self._read :])
            known = 1.0 - self._FORGOTTEN
            self._right = known * self._right + right
            self._wrong = known * self._wrong + (right < len(self._guesses))
            self._guesses = []
        chance = self._right / (self._right + self._wrong)
        return max(1, int(math.log(self._LIKELY) / math.log(min(chance, 0.99))))


def quantized_copy(model: CausalLM, kind: str) -> CausalLM:
    """The same model with matrices quantised to `kind`, the head among them; it shares everything else.

    Matrices whose rows are no multiple of the kind's blocks stay as they are.

    Raises:
        ValueError: `kind` is not one of GGUF's that fastlm knows.
    """
    if kind not in KINDS:
        raise ValueError(f"quantized_copy: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    block = KINDS[kind].block
    held = [value for module in model.modules() for value in vars(module).values()]
    shared = [*model.parameters(), *model.buffers(), *(value for value in held if isinstance(value, QuantizedTensor))]
    small = copy.deepcopy(model, {id(thing): thing for thing in shared})
    for name, module in list(small.named_modules()):
        if isinstance(module, (Linear, QuantizedLinear)) and module.in_features % block == 0:
            small.set_submodule(name, _quantized(module.weight, module.bias, kind))
    if small.output is None and small.embedding.weight.shape[1] % block == 0:  # the embedding serves as the head
        small.output = _quantized(small.embedding.weight, small.head_bias, kind)
    return small.eval()


def _quantized(weight: Tensor | QuantizedTensor, bias: Tensor | None, kind: str) -> QuantizedLinear:
    plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach()
    return QuantizedLinear(QuantizedTensor.quantize(plain, kind), None if bias is None else bias.detach())
