"""Continuous batching: requests join a running batch as rows of the state get free, and leave it as they end.

A request's prompt is read when it joins. From then on it takes part in decode steps, which are recorded once for each
size of batch (`capture`; on CUDA `graph`) and replayed natively; the tensors of `Lanes` say whose rows they are. Where
a step cannot be recorded, it runs op by op. While a single request is active, its tokens can be guessed ahead
(`steps`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlm.generation.draft import Draft, PromptLookup, common
from fastlm.generation.lanes import Request, dense_bias
from fastlm.generation.params import SamplingParams, as_ids
from fastlm.generation.recordings import Recordings
from fastlm.generation.steps import Steps
from fastlm.models.base import CausalLM
from fastlm.nn.linear import rows_apart
from fastlm.nn.state import KVCache
from fastlm.reference.linear import FEW_TOKENS

__all__ = ["Engine", "FinishReason", "Token"]

FinishReason = Literal["stop", "length", "context"]
"""A stop token or stop string; max_new_tokens reached; the model's context is full."""

_PREFILL_CHUNK = 512  # tokens a prompt advances at a time: bounds the activations of a long prompt
_WORTH_REUSING = 16  # tokens that two prompts share, below which copying them is no gain


@dataclass(frozen=True)
class Token:
    """One sampled token of one request."""

    row: int
    id: int
    logprob: float | None
    finish: FinishReason | None


class Engine:
    """Generates for requests that come and go.

    Prompts are read one by one, or together where no product can tell, and decoding uses kernels whose rows do not see
    each other, so a request's tokens do not depend on what else is active, nor on when it came.

    Args:
        model: a causal language model, in eval mode. Its parameters must not change while it generates.
        rows: requests that can be active at once; others wait.
        max_length: tokens a request can hold, prompt included; None: the model's context.
        stop_ids: tokens that end a request; they are returned as its last token.
        capture: record the decode steps and replay them where that is possible; False runs every step op by op.
        reuse_prefixes: do not read again what a prompt shares with the beginning of another request, active or past.
            The numbers then come from another division of the prompt into products, whose last bits can differ.
        kv_dtype: of the KV cache, as in `CausalLM.make_state`.
        draft_model: guesses for requests with `draft_tokens`; None: prompt lookup does.
        rewritable: `rewrite` can be used. A recurrent model's state is then kept before each step.

    Raises:
        ValueError: `rows`, `max_length` or `kv_dtype` is not what the model can have, or the draft's vocabulary is
            another.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        rows: int,
        max_length: int | None = None,
        stop_ids: Collection[int] = (),
        capture: bool = True,
        reuse_prefixes: bool = False,
        kv_dtype: torch.dtype | None = None,
        draft_model: CausalLM | None = None,
        rewritable: bool = False,
    ) -> None:
        if draft_model is not None and draft_model.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"draft_model: its vocabulary has {draft_model.config.vocab_size} tokens, the model's "
                f"{model.config.vocab_size}"
            )
        self._model = model
        self._draft_model = draft_model
        self._state = model.make_state(rows, max_length, kv_dtype=kv_dtype)
        self._max_length = self._state.max_length or max_length
        self._stop_ids = frozenset(int(token) for token in stop_ids)
        self._reuse = reuse_prefixes and isinstance(self._state, KVCache)
        self._held: list[list[int]] = [[] for _ in range(rows)]  # what each row of the state has read
        self._free = list(range(rows))
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._count = 0
        self._recordings = Recordings(model, self._state, self._stop_ids, self._max_length, capture=capture)
        self._steps = Steps(model, self._state, self._recordings, self._stop_ids, self._max_length)
        self._drafting: Engine | None = None  # of `draft_model`
        # A recurrent state cannot be shortened: what it was after so many tokens.
        self._marks: dict[int, Callable[[], None]] | None = (
            {} if rewritable and not isinstance(self._state, KVCache) else None
        )

    @property
    def active(self) -> tuple[int, ...]:
        """Numbers of the requests that have not ended, those that wait among them."""
        return tuple(request.number for request in (*self._active, *self._waiting))

    @property
    def max_length(self) -> int | None:
        """Tokens a request can hold, prompt included; None: as many as there is memory for."""
        return self._max_length

    def holds(self, rows: int, max_length: int) -> bool:
        """Whether nothing is under way, and there is room for so many requests of so many tokens. Numbers of requests
        then begin at 0 again."""
        if (
            self.active
            or len(self._free) < len(self._held)
            or len(self._held) < rows
            or (self._max_length is not None and self._max_length < max_length)
        ):
            return False
        self._count = 0
        return True

    @property
    def state_bytes(self) -> int:
        """Bytes reserved for KV caches, the draft's included."""
        own = self._state.nbytes if isinstance(self._state, KVCache) else 0
        return own + (0 if self._drafting is None else self._drafting.state_bytes)

    @property
    def reusable(self) -> bool:
        """Whether its recordings still go by the model's weights when these were written to in the meantime: those of a
        recurrent model are of packed copies; and whether its steps are recorded at all."""
        own = isinstance(self._state, KVCache) and self.why_not_captured is None
        return own and (self._drafting is None or self._drafting.reusable)

    @property
    def why_not_captured(self) -> str | None:
        """Why steps run op by op; None where they are replayed, or none has been tried yet."""
        return self._recordings.why_not

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, sequence: int = 0, draft: Draft | None = None
    ) -> int:
        """Queues a request; it joins with the next `step` for which a row is free.

        Args:
            prompt: token ids, at least one.
            params: its options.
            sequence: of its random numbers: requests of the same prompt and seed draw differently by it.
            draft: guesses `params.draft_tokens` tokens ahead while it is alone; None: `draft_model`, or prompt lookup.

        Returns:
            The request's number, counted from 0.

        Raises:
            ValueError: the prompt is empty or too long, or it or `params.logit_bias` names a token that does not exist.
        """
        ids = as_ids([prompt])[0]
        if self._max_length is not None and len(ids) > self._max_length:
            raise ValueError(
                f"prompt {self._count} has {len(ids)} tokens, but the context holds {self._max_length}: shorten it"
            )
        # Now, and not when it joins: that is the others' step too.
        vocab_size = self._model.config.vocab_size
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"prompt {self._count}: id {outside[0]} is outside the vocabulary of {vocab_size}")
        params = params.with_seed()
        bias = dense_bias(params.logit_bias, vocab_size)
        if draft is None and params.draft_tokens:
            draft = self._default_draft(ids, params, sequence)
        self._waiting.append(Request(self._count, ids, params, sequence, bias, draft))
        self._count += 1
        return self._count - 1

    def _default_draft(self, ids: list[int], params: SamplingParams, sequence: int) -> Draft:
        if self._draft_model is None:
            return PromptLookup(ids)
        from fastlm.generation.draft_model import ModelDraft  # which is an engine itself

        if self._drafting is None:
            limits = [n for n in (self._max_length, self._draft_model.config.context_length) if n is not None]
            self._drafting = ModelDraft.engine(self._draft_model, min(limits, default=None))
        return ModelDraft(self._draft_model, params, sequence=sequence, engine=self._drafting)

    @torch.inference_mode()
    def rewrite(self, number: int, ids: Sequence[int]) -> None:
        """Makes `ids` the tokens of an active request, which goes on from there: what it has else is forgotten.

        Raises:
            ValueError: no such request is active, or `ids` parts from its tokens where the state of a recurrent model
                was not kept: before the last `rewrite`.
        """
        found = [request for request in self._active if request.number == number]
        if not found:
            raise ValueError(f"rewrite: request {number} is not active")
        request = found[0]
        known = min(common(request.ids, ids), len(request.ids) - 1, len(ids) - 1)
        if self._marks is None:
            self._state.lengths[request.slot] = known
        elif known < len(request.ids) - 1:
            if known not in self._marks:
                raise ValueError(f"rewrite: the state after {known} tokens was not kept")
            self._marks[known]()
        if self._marks is not None:
            self._marks.clear()
        if self._recordings.of([request], 1).captured is not None and known == len(ids) - 2:
            request.ids = list(ids[:-1])
            self._recordings.stale()
            self._steps.replay(self._recordings.filled([request], 1))  # one token, sooner than op by op
        elif known < len(ids) - 1:
            missing = torch.tensor([list(ids[known:-1])], dtype=torch.int64, device=self._model.device)
            state = self._state.row(request.slot)
            for chunk in missing.split(_PREFILL_CHUNK, dim=1):
                self._model.hidden(chunk, state)
        request.ids = list(ids)
        self._recordings.stale()

    def cancel(self, number: int) -> None:
        """Ends a request from outside: it takes no part in further steps."""
        for request in [r for r in self._active if r.number == number]:
            self._leave(request)
        self._waiting = deque(request for request in self._waiting if request.number != number)

    @torch.inference_mode()
    def step(self, ahead: int = 1) -> list[Token]:
        """Samples the next token of every request, those that can join now included.

        Args:
            ahead: take up to so many steps at once, where nothing ends a request before.

        Returns:
            A token for each request in the order of `active`, step after step; nothing when all have ended.
        """
        running = list(self._active)
        joined: list[tuple[Request, int, Tensor]] = []
        try:
            while self._waiting and self._free:
                joined += self._join(self._together())
        except BaseException:
            self._wait_again([request for request, _, _ in joined])
            raise
        tokens: list[Token] = []
        if running:
            if self._marks is not None:
                ahead = 1
                self._marks[len(running[0].ids) - 1] = self._state.snapshot()
            for ids, logits in self._steps.advance(running, 1 if joined or self._waiting else ahead):
                tokens += self._accept(running, ids, logits)
        for request, token, logits in joined:
            tokens += self._accept([request], [token], logits)
        return tokens

    def _together(self) -> list[Request]:
        """The next requests to join: as many as can be read in one pass, which changes no bit of any.

        More than a few tokens attend to a slice of the cache: of several rows only where those are all.
        """
        first = self._waiting.popleft()
        tokens, group = len(first.ids), [first]
        if self._reuse or not isinstance(self._state, KVCache):
            return group
        most = min(len(self._free), _PREFILL_CHUNK // tokens)
        while self._waiting and len(group) < most and len(self._waiting[0].ids) == tokens:
            # The output layer sees each prompt's last token alone.
            if len(group) == 1 and not rows_apart(self._model, tokens, besides=self._model.output):
                break
            group.append(self._waiting.popleft())
        if tokens > FEW_TOKENS and self._free[: len(group)] != list(range(len(self._held))):
            self._waiting.extendleft(reversed(group[1:]))
            return group[:1]
        return group

    def _join(self, requests: list[Request]) -> list[tuple[Request, int, Tensor]]:
        """Reads the prompts, several of one length or one of any, and samples their first tokens.

        Where one of them cannot be drawn for, the error is about that one: the others wait again.
        """
        drawing = requests[0]
        joined = []
        try:
            for request, logits in self._read(requests):
                drawing = request
                recording = self._recordings.of([request], 1, logits=True)
                recording.lanes.fill([request], self._stop_ids)
                self._recordings.stale()
                joined.append((request, int(recording.lanes.sample(logits)), logits))
        except BaseException:
            self._wait_again([request for request in requests if request is not drawing])
            self._vacate(drawing)
            raise
        self._active += requests
        return joined

    def _vacate(self, request: Request) -> None:
        """The request's row is free, what it has read being unknown."""
        if request in self._active:
            self._active.remove(request)
        if request.slot >= 0:
            self._held[request.slot] = []
            self._free.append(request.slot)
            self._free.sort()
            request.slot = -1

    def _wait_again(self, requests: list[Request]) -> None:
        """These have not joined after all, and are the next to."""
        for request in reversed(requests):
            self._vacate(request)
            self._waiting.appendleft(request)

    def _read(self, requests: list[Request]) -> Iterator[tuple[Request, Tensor]]:
        """The requests with the logits [1, V] behind their prompts."""
        taken = []
        for request in requests:
            request.slot, known = self._row_for(request.ids)
            self._free.remove(request.slot)
            taken.append(request.slot)
            state = self._state.row(request.slot)
            state.reset()
            state.lengths.fill_(known)
        self._steps.pace.join()
        if self._marks is not None:
            self._marks.clear()
        if len(requests) == 1 and (found := self._recordings.read(requests[0].ids[known:], taken[0])) is not None:
            hidden, logits = found
            self._recordings.screening.saw(hidden)
            yield requests[0], logits
            return
        device = self._model.device
        ids = torch.tensor([request.ids[known:] for request in requests], dtype=torch.int64, device=device)
        rows = None
        if len(requests) > 1:
            state, rows = self._state, taken
        for chunk in ids.split(_PREFILL_CHUNK, dim=1):
            hidden = self._model.hidden(chunk, state, rows)
        self._recordings.screening.saw(hidden)
        logits = self._model.head(hidden[:, -1:])[:, -1]
        for at, request in enumerate(requests):
            yield request, logits[at : at + 1]

    def _row_for(self, prompt: list[int]) -> tuple[int, int]:
        """A free row of the state, and how many of the prompt's tokens it holds already."""
        if not self._reuse:
            return self._free[0], 0
        assert isinstance(self._state, KVCache)
        for request in self._active:
            self._held[request.slot] = request.ids[:-1]
        # The last token has to be read in any case, for its logits.
        shared = [common(held, prompt[:-1]) for held in self._held]
        target = max(self._free, key=lambda row: (shared[row], -len(self._held[row]), -row))
        source = max(range(len(shared)), key=lambda row: shared[row])
        count = max(shared)
        if count < _WORTH_REUSING:
            return target, 0
        if shared[target] < count:
            for tensor in (*self._state.keys, *self._state.values):
                tensor[target, :, :count] = tensor[source, :, :count]
        return target, count

    def _leave(self, request: Request) -> None:
        self._active.remove(request)
        self._held[request.slot] = request.ids[:-1]
        self._free.append(request.slot)
        self._free.sort()

    def _accept(self, requests: list[Request], ids: list[int], logits: Tensor | None) -> list[Token]:
        logprobs: list[float] | None = None
        if any(request.params.logprobs for request in requests):
            assert logits is not None
            chosen = torch.tensor(ids, device=logits.device)[:, None]
            logprobs = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
        tokens = []
        for at, (request, token) in enumerate(zip(list(requests), ids, strict=True)):
            was_early = request.early
            request.ids.append(token)
            finish: FinishReason | None = None
            if token in self._stop_ids:
                finish = "stop"
            elif request.generated >= request.params.max_new_tokens:
                finish = "length"
            elif self._max_length is not None and len(request.ids) > self._max_length:
                finish = "context"
            logprob = logprobs[at] if logprobs is not None and request.params.logprobs else None
            tokens.append(Token(request.number, token, logprob, finish))
            if finish is not None:
                self._leave(request)
            elif was_early and not request.early:
                self._recordings.stale()  # stop tokens are allowed now
        return tokens
