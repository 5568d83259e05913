"""Greedy decoding of a real model, batch 1, ours and llama.cpp from the very same file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench import models
from bench.case import Case
from bench.gates import smollm2_gate, text
from bench.generating import PEERS, matrices, task
from bench.worker import OURS, Pool

__all__ = ["cases"]

_TOKENS = 128
_PROMPT = 16
_GOALS = {
    ("Q4_1", "llama_cpp"): 2.0,
    ("Q8_0", "llama_cpp"): 1.8,
    ("Q4_0", "llama_cpp"): 1.3,
    ("F16", "llama_cpp"): 1.2,
    ("F32", "llama_cpp"): 1.1,
    ("F32", "ctranslate2"): 1.1,
    ("F32", "transformers"): None,
    ("Q4_1", "transformers"): 15.0,
}


def cases() -> Iterator[Case]:
    """SmolLM2-135M at each kind of weights against llama.cpp, and against the float32 engines."""
    for kind in models.KINDS:
        with Pool(torch.get_num_threads()) as pool:
            for (of, engine), goal in _GOALS.items():
                if of == kind:
                    yield _case(pool, kind, engine, goal)


def _case(pool: Pool, kind: str, engine: str, goal: float | None) -> Case:
    file = models.smollm2(kind)
    prompt = [text()[:_PROMPT]]
    size = matrices(file)
    theirs = models.smollm2_ctranslate2 if engine == "ctranslate2" else file
    ours = task(pool, OURS, file, prompt, _TOKENS)
    return Case(
        name=f"decode SmolLM2-135M {kind}",
        shape=f"batch 1, {_TOKENS} tokens",
        peer_name=PEERS[engine].format(kind=kind if engine == "llama_cpp" else "float32"),
        gate=partial(smollm2_gate, kind),
        ours=ours,
        settle=ours.settle,
        peer=task(pool, engine, theirs, prompt, _TOKENS),
        work=_TOKENS,
        unit="tokens",
        goal=goal,
        pairs=5,
        moved=size.nbytes * _TOKENS,
        resident=size.nbytes,
        flops=2 * size.elements * _TOKENS,
        note=models.how_made(kind),
    )
