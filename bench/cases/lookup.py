"""Guessing ahead (prompt lookup) against plain decoding, both ours: where the text repeats itself and where not."""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Iterator

import fastlm
from bench import models
from bench.case import Case, require
from fastlm.generation import Engine

__all__ = ["cases"]

_TOKENS = 128
_DRAFTS = 7  # with the token before them two tiles of four rows


def cases() -> Iterator[Case]:
    """SmolLM2-135M Q4_1: a prompt that the continuation repeats, and one that leads anywhere."""
    lm = fastlm.load(models.smollm2("Q4_1"))
    paragraph = pydoc_data.topics.topics["assert"][:900]
    prompts = {
        "the text repeats its prompt": (paragraph + paragraph[:450], 2.0),
        "open-ended text": ("The history of the steam engine begins", 0.97),
    }
    for name, (prompt, goal) in prompts.items():

        def run(draft_tokens: int, ids: list[int] = lm.encode(prompt)) -> tuple[list[int], float]:  # noqa: B008
            """The tokens, and the seconds of decoding, the prompt being read before."""
            options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "temperature": 0.0}
            params = fastlm.SamplingParams(draft_tokens=draft_tokens, **options)  # type: ignore[arg-type]
            engine = Engine(lm.model, rows=1, max_length=len(ids) + _TOKENS, stop_ids=lm.stop_ids)
            engine.submit(ids, params)
            tokens = [token.id for token in engine.step()]
            start = time.perf_counter()
            while engine.active:
                tokens += [token.id for token in engine.step(16)]
            return tokens, time.perf_counter() - start

        def gate(run=run) -> None:  # type: ignore[no-untyped-def]
            require(run(_DRAFTS)[0] == run(0)[0], "guessing has changed the tokens")

        yield Case(
            name="prompt lookup, SmolLM2-135M Q4_1",
            shape=f"{name}, {_TOKENS} tokens",
            peer_name="plain decoding, ours",
            gate=gate,
            ours=lambda run=run: run(_DRAFTS)[1],  # type: ignore[misc]
            peer=lambda run=run: run(0)[1],  # type: ignore[misc]
            unit="seconds",
            goal=goal,
            pairs=5,
            note="the time after the prompt has been read",
        )
