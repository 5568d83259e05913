"""Is the model's answer right? Logits against float32, perplexity on real text, greedy text."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import models
from bench.case import GateFailed, require
from bench.worker import OURS, EngineError, Pool, Worker

__all__ = ["Quality", "judge_greedy", "judge_quality", "quality", "smollm2_gate", "text"]

_CHUNK = 512
_CHUNKS = 4
_GREEDY = 64
# Where llama.cpp can't be asked: its mean KL on 512 tokens of a real text, as it was measured once. Other kinds are
# then judged by perplexity alone.
_KL_WITHOUT_PEER = {"Q4_1": 3.3e-3, "Q8_0": 4.5e-3, "F32": 9e-7}
_NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Quality:
    """Of an engine's logits: mean KL(reference || engine) in nats, and both perplexities on the same text."""

    kl: float
    perplexity: float
    reference_perplexity: float


@functools.cache
def text() -> list[int]:
    """SmolLM2's tokens of Python's language reference, the text that every Python has with it."""
    import fastlm
    from fastlm.data.corpora import corpus

    ids = fastlm.load(models.smollm2("Q4_1")).tokenizer.encode("\n".join(corpus("topics"))[:60_000])
    assert len(ids) > _CHUNK * (_CHUNKS + 1), len(ids)
    return ids


def quality(wanted: Sequence[Tensor], got: Sequence[Tensor], ids: Sequence[Sequence[int]]) -> Quality:
    """Compares logits [T, V], text by text, in float64."""
    kl = nll = reference_nll = 0.0
    count = 0
    for want_logits, logits, tokens in zip(wanted, got, ids, strict=True):
        for begin in range(0, len(tokens), 128):  # in float64 the whole would be large
            want = want_logits[begin : begin + 128].double().log_softmax(-1)
            have = logits[begin : begin + 128].double().log_softmax(-1)
            kl += float((want.exp() * (want - have)).sum())
            next_ids = torch.tensor(tokens[begin + 1 : begin + 129]).unsqueeze(1)
            nll -= float(have[: len(next_ids)].gather(1, next_ids).sum())
            reference_nll -= float(want[: len(next_ids)].gather(1, next_ids).sum())
            count += len(want)
    scored = count - len(ids)
    return Quality(kl / count, math.exp(nll / scored), math.exp(reference_nll / scored))


def judge_quality(ours: Quality, limit: float, whose: str) -> None:
    """Raises GateFailed where ours is further from float32 than `limit`, or its perplexity is off by over 0.5%."""
    require(ours.kl <= limit, f"mean KL to float32 is {ours.kl:.2e}, above {whose}'s {limit:.2e}")
    off = abs(ours.perplexity / ours.reference_perplexity - 1)
    require(off <= 5e-3, f"perplexity {ours.perplexity:.3f} is not float32's {ours.reference_perplexity:.3f}")


def judge_greedy(ours: list[int], wanted: list[int], margin_at: Sequence[float]) -> None:
    """Raises GateFailed where greedy texts differ, except from a place where the reference itself nearly ties:
    `margin_at[i]` is the gap between its two best logits for token i of `wanted`."""
    require(len(ours) == len(wanted), f"{len(ours)} greedy tokens, expected {len(wanted)}")
    for at, (token, want) in enumerate(zip(ours, wanted, strict=True)):
        if token != want:
            require(margin_at[at] <= _NEAR_TIE, f"greedy token {at} differs from transformers' float32")
            return


def _margins(reference: Worker, prompt: list[int], new: list[int]) -> list[float]:
    logits = torch.from_numpy(reference.call("logits", prompt + new))[len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1).values
    gaps: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return gaps


def _logits(worker: Worker, chunks: Sequence[list[int]]) -> list[Tensor]:
    return [torch.from_numpy(worker.call("logits", chunk)) for chunk in chunks]


_VERDICTS: dict[str, str | GateFailed] = {}


def smollm2_gate(kind: str) -> str:
    """The gate of every case on the SmolLM2 file of this kind; asked once per run.

    Against transformers in float32 on the weights of the same file: mean KL no worse than llama.cpp's on it,
    perplexity within 0.5% over 2,048 tokens, and identical greedy text in exact arithmetic. Returns the figures.
    """
    if kind not in _VERDICTS:
        try:
            _VERDICTS[kind] = _smollm2(models.smollm2(kind), kind)
        except GateFailed as error:
            _VERDICTS[kind] = error
    verdict = _VERDICTS[kind]
    if isinstance(verdict, GateFailed):
        raise verdict
    return verdict


def _smollm2(file: Path, kind: str) -> str:
    chunks = [text()[at * _CHUNK : (at + 1) * _CHUNK] for at in range(_CHUNKS)]
    with Pool(torch.get_num_threads()) as pool:
        reference = pool.get("transformers", file)
        wanted = _logits(reference, chunks)
        prompt = text()[-16:]
        greedy = reference.call("generate", [prompt], _GREEDY)[0]
        judge_greedy(
            pool.get(OURS, file, compute="exact").call("generate", [prompt], _GREEDY)[0],
            greedy,
            _margins(reference, prompt, greedy),
        )
        ours = quality(wanted, _logits(pool.get(OURS, file), chunks), chunks)
        try:
            peer = quality(wanted, _logits(pool.get("llama_cpp", file), chunks), chunks).kl
            whose = "llama.cpp"
        except EngineError:
            peer, whose = _KL_WITHOUT_PEER.get(kind, math.inf), "limit without llama.cpp"
    judge_quality(ours, peer, whose)
    return (
        f"KL {ours.kl:.1e} ({whose} {peer:.1e}), perplexity {ours.perplexity:.3f} "
        f"(float32 {ours.reference_perplexity:.3f}), greedy text in exact arithmetic identical"
    )
