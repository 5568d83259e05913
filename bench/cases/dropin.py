"""transformers' own `model.generate` with the one added argument `custom_generate=fastlm.generate`, and without it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import models
from bench.case import Case, GateFailed, require
from bench.gates import judge_quality, quality, text
from bench.generating import matrices, task
from bench.worker import OURS, EngineError, Pool

__all__ = ["cases"]

_TOKENS = 128
# Against the float32 model, so the rounding of the weights counts too: what llama.cpp's own 8 bits are from theirs.
_KL = 4.5e-3
_GOALS = {"float32": 3.0, "Q8_0": 8.0}


def cases() -> Iterator[Case]:
    """SmolLM2-135M loaded by transformers in float32, batch 1, greedy; decoded in float32, and in 8 bits."""
    with Pool(torch.get_num_threads()) as pool:
        for door in _GOALS:
            yield _case(pool, door)


def _case(pool: Pool, door: str) -> Case:
    file = models.smollm2("F32")
    prompt = [text()[:16]]
    ours = task(pool, "transformers", file, prompt, _TOKENS, door=door)
    peer = task(pool, "transformers", file, prompt, _TOKENS)
    size = matrices(file if door == "float32" else models.smollm2(door))

    def gate() -> str:
        try:
            got = ours()
        except EngineError as error:
            raise GateFailed(str(error)) from error
        if door == "float32":
            require(got == peer(), "greedy text differs from transformers' own")
            return "greedy text identical"
        # The same conversion of the same weights, as a file: its logits against float32's.
        ids = text()[:512]
        wanted = torch.from_numpy(pool.get("transformers", file).call("logits", ids))
        logits = torch.from_numpy(pool.get(OURS, models.smollm2(door)).call("logits", ids))
        verdict = quality([wanted], [logits], [ids])
        judge_quality(verdict, _KL, "the limit for 8 bits")
        return f"KL {verdict.kl:.1e}, perplexity {verdict.perplexity:.3f} ({verdict.reference_perplexity:.3f})"

    return Case(
        name=f"transformers' generate with custom_generate, {door}",
        shape=f"SmolLM2-135M, batch 1, {_TOKENS} tokens",
        peer_name="transformers' generate, float32",
        gate=gate,
        ours=ours,
        settle=ours.settle,
        peer=peer,
        work=_TOKENS,
        unit="tokens",
        goal=_GOALS[door],
        pairs=5,
        moved=size.nbytes * _TOKENS,
        resident=size.nbytes,
        flops=2 * size.elements * _TOKENS,
        note="a Q8_0 copy drafts, so not every token reads all weights" if door == "float32" else "",
    )
