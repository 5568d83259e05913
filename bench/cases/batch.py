"""Decoding a batch of 8 with top-p sampling, sampling included."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import models
from bench.case import Case, require
from bench.gates import smollm2_gate, text
from bench.generating import PEERS, matrices, task
from bench.worker import OURS, Pool

__all__ = ["cases"]

_ROWS, _PROMPT, _TOKENS, _TOP_P = 8, 32, 64, 0.9
_PEERS = {
    "Q4_1": ("llama_cpp",),
    "Q8_0": ("llama_cpp",),
    "F32": ("llama_cpp", "ctranslate2", "transformers"),
}


def cases() -> Iterator[Case]:
    """SmolLM2-135M, eight prompts of equal length (nobody has to pad), temperature 0.8 and top-p 0.9."""
    for kind, engines in _PEERS.items():
        with Pool(torch.get_num_threads()) as pool:
            for engine in engines:
                yield _case(pool, kind, engine)


def _case(pool: Pool, kind: str, engine: str) -> Case:
    file = models.smollm2(kind)
    prompts = [text()[row * _PROMPT : (row + 1) * _PROMPT] for row in range(_ROWS)]
    size = matrices(file)
    theirs = models.smollm2_ctranslate2 if engine == "ctranslate2" else file
    options = {"sequences": _ROWS} if engine == "llama_cpp" else {}

    def gate() -> str:
        verdict = smollm2_gate(kind)
        together = task(pool, OURS, file, prompts, 16)()
        alone = [task(pool, OURS, file, [prompt], 16)()[0] for prompt in prompts]
        require(together == alone, "a row's greedy text depends on its batch")
        return verdict

    return Case(
        name=f"decode SmolLM2-135M {kind}, top-p {_TOP_P}",
        shape=f"batch {_ROWS}, {_TOKENS} tokens each",
        peer_name=PEERS[engine].format(kind=kind if engine == "llama_cpp" else "float32"),
        gate=gate,
        ours=task(pool, OURS, file, prompts, _TOKENS, top_p=_TOP_P),
        peer=task(pool, engine, theirs, prompts, _TOKENS, top_p=_TOP_P, **options),
        work=_ROWS * _TOKENS,
        unit="tokens",
        goal=1.5,
        pairs=5,
        moved=size.nbytes * _TOKENS,
        resident=size.nbytes,
        flops=2 * size.elements * _TOKENS * _ROWS,
        note=models.how_made(kind),
    )
