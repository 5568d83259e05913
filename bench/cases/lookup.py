"""Guessing ahead against plain decoding, both ours: from a text that repeats itself or not; by a quantised copy."""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Iterator

import fastlm
from bench import models
from bench.case import Case, require
from bench.engines import settle
from fastlm.generation import Engine, LanguageModel
from fastlm.generation.draft_model import DRAFT_TOKENS, quantized_copy
from fastlm.models import CausalLM

__all__ = ["cases"]

_TOKENS = 128
_DRAFTS = 7  # with the token before them two tiles of four rows


def cases() -> Iterator[Case]:
    """SmolLM2-135M: a prompt that the continuation repeats, one that leads anywhere; a copy that drafts for float32."""
    lm = fastlm.load(models.smollm2("Q4_1"))
    paragraph = pydoc_data.topics.topics["assert"][:900]
    open_ended = "The history of the steam engine begins"
    name, repeats = "prompt lookup, SmolLM2-135M Q4_1", "the text repeats its prompt"
    at_one = "open-ended text, temperature 1"
    yield _case(name, repeats, lm, paragraph + paragraph[:450], 2.0)
    yield _case(name, f"{repeats}, a later call", lm, paragraph + paragraph[:450], 2.0, kept=True)
    yield _case(name, "open-ended text", lm, open_ended, 0.97)
    yield _case(name, at_one, lm, open_ended, 0.97, temperature=1.0)
    plain = fastlm.load(models.smollm2("F32"))
    draft = quantized_copy(plain.model, "Q8_0")
    name = "drafts by a Q8_0 copy, SmolLM2-135M float32"
    yield _case(name, "open-ended text, greedy", plain, open_ended, 1.3, draft)
    yield _case(name, at_one, plain, open_ended, 0.97, draft, temperature=1.0)


def _case(
    name: str,
    shape: str,
    lm: LanguageModel,
    prompt: str,
    goal: float,
    draft: CausalLM | None = None,
    temperature: float = 0.0,
    kept: bool = False,
) -> Case:
    """`kept`: by engines that have had the text before, their steps being recorded, as `LanguageModel` keeps its own
    from call to call; else both record theirs within the time."""
    ids = lm.encode(prompt)
    count = _DRAFTS if draft is None else DRAFT_TOKENS
    engines: dict[int, Engine] = {}

    def run(draft_tokens: int) -> tuple[list[int], float]:
        """The tokens, and the seconds of decoding, the prompt being read before."""
        params = fastlm.SamplingParams(
            draft_tokens=draft_tokens,
            max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS,
            temperature=temperature,
            seed=1,
        )
        engine = engines.pop(draft_tokens, None) or Engine(
            lm.model, rows=1, max_length=len(ids) + _TOKENS, stop_ids=lm.stop_ids, draft_model=draft
        )
        engine.submit(ids, params)
        tokens = [token.id for token in engine.step()]
        start = time.perf_counter()
        while engine.active:
            tokens += [token.id for token in engine.step(16)]
        seconds = time.perf_counter() - start
        if kept:
            engines[draft_tokens] = engine
        return tokens, seconds

    def gate() -> None:
        settle(lambda: run(0))  # both sides are by the model's screen, if it has one
        settle(lambda: run(count))
        require(run(count)[0] == run(0)[0], "guessing has changed the tokens")

    return Case(
        name=name,
        shape=f"{shape}, {_TOKENS} tokens",
        peer_name="plain decoding, ours",
        gate=gate,
        ours=lambda: run(count)[1],
        peer=lambda: run(0)[1],
        unit="seconds",
        goal=goal,
        pairs=5,
        note="the time after the prompt has been read" + ("; steps were recorded by a call before" if kept else ""),
    )
