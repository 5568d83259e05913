"""Reading a prompt: 512 tokens in, the first new token out."""

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

_PROMPT = 512


def cases() -> Iterator[Case]:
    """SmolLM2-135M at each kind of weights against llama.cpp, and at float32 against everybody."""
    for kind in models.KINDS:
        with Pool(torch.get_num_threads()) as pool:
            for engine in ("llama_cpp", "ctranslate2", "transformers") if kind == "F32" else ("llama_cpp",):
                yield _case(pool, kind, engine)


def _case(pool: Pool, kind: str, engine: str) -> Case:
    file = models.smollm2(kind)
    prompt = [text()[:_PROMPT]]
    size = matrices(file)
    theirs = models.smollm2_ctranslate2 if engine == "ctranslate2" else file
    return Case(
        name=f"prefill SmolLM2-135M {kind}",
        shape=f"{_PROMPT} tokens",
        peer_name=PEERS[engine].format(kind=kind if engine == "llama_cpp" else "float32"),
        gate=partial(smollm2_gate, kind),
        ours=task(pool, OURS, file, prompt, 1),
        peer=task(pool, engine, theirs, prompt, 1),
        work=_PROMPT,
        unit="tokens",
        goal=1.1,
        seconds=1.0,
        moved=size.nbytes,
        # The head is needed for the last token alone.
        flops=2 * (size.elements - size.head_elements) * _PROMPT + 2 * size.head_elements,
        note=models.how_made(kind),
    )
