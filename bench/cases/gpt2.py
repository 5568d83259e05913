"""The shape of GPT-2 124M (random weights) in 8 bits, batch 1, greedy."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import models
from bench.case import Case
from bench.gates import judge_quality, quality
from bench.generating import matrices, task
from bench.worker import OURS, EngineError, Pool

__all__ = ["cases"]

_TOKENS = 128


def cases() -> Iterator[Case]:
    """Our Q8_0 against CTranslate2's int8, llama.cpp on the same file, and transformers in float32."""
    file = models.gpt2_gguf("Q8_0")
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (512,)).tolist()
    prompt = [ids[:16]]
    size = matrices(file)
    with Pool(torch.get_num_threads()) as pool:
        ours = task(pool, OURS, file, prompt, _TOKENS)
        gate = functools.cache(functools.partial(_gate, pool, file, ids))
        for engine, peer_name, model, options, goal in (
            ("ctranslate2", "CTranslate2 int8", models.gpt2_ctranslate2, {"compute_type": "int8"}, 3.0),
            ("llama_cpp", "llama.cpp Q8_0", file, {}, None),
            ("transformers", "transformers float32", models.gpt2_folder, {}, 7.0),
        ):
            yield Case(
                name="decode GPT-2 124M int8",
                shape=f"batch 1, {_TOKENS} tokens",
                peer_name=peer_name,
                gate=gate,
                ours=ours,
                settle=ours.settle,
                peer=task(pool, engine, model, prompt, _TOKENS, **options),
                work=_TOKENS,
                unit="tokens",
                goal=goal,
                pairs=5,
                moved=size.nbytes * _TOKENS,
                resident=size.nbytes,
                flops=2 * size.elements * _TOKENS,
                note="random weights; ours in Q8_0, every matrix but the positions",
            )


def _gate(pool: Pool, file: Path, ids: list[int]) -> str:
    """Our logits no further from transformers' in float32 than CTranslate2's int8."""

    def logits(engine: str, model: Path, **options: str) -> list[torch.Tensor]:
        return [torch.from_numpy(pool.get(engine, model, **options).call("logits", ids))]

    wanted = logits("transformers", models.gpt2_folder())
    ours = quality(wanted, logits(OURS, file), [ids])
    try:
        peer = quality(wanted, logits("ctranslate2", models.gpt2_ctranslate2(), compute_type="int8"), [ids]).kl
        whose = "CTranslate2 int8"
    except EngineError:
        peer, whose = 1e-3, "the limit without CTranslate2"
    judge_quality(ours, peer, whose)
    return f"KL {ours.kl:.1e} ({whose} {peer:.1e})"
