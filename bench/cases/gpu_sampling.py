"""Sampling a token on a GPU against transformers' processors with multinomial, and FlashInfer. float32 logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, require
from bench.cases import sampling
from bench.gpu import live
from fastlm import ops

__all__ = ["cases"]

_SHAPES = ((1, 50_257), (8, 50_257), (1, 128_256), (64, 128_256))


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """(batch, vocabulary), as `sampling` has them and a large batch."""
    for batch, vocab in ((2, 300),) if small else _SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(batch, vocab, device=device) * 2.5
        for name, settings in sampling.SETTINGS.items():
            theirs = partial(sampling.draw, sampling.transformers(settings, device), logits)
            peers = {"transformers + multinomial": theirs, "FlashInfer": partial(_flashinfer, logits, settings)}
            for peer, run in peers.items():
                yield Case(
                    name=f"sample, {name}",
                    shape=f"vocabulary {vocab:,}, batch {batch}",
                    peer_name=peer,
                    gate=partial(_gate, logits, settings),
                    ours=partial(ops.sample, logits, **settings, seed=1),
                    peer=live.peer(peer, run),
                    moved=4.0 * logits.numel(),
                    note="ours waits for the tokens, to refuse rows that can't be drawn from",
                    device=device,
                )


def _flashinfer(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    from flashinfer import sampling as theirs

    probabilities = torch.softmax(logits / settings["temperature"], dim=-1)
    match settings:
        case {"top_k": k, "top_p": p}:
            return theirs.top_k_top_p_sampling_from_probs(probabilities, k, p)
        case {"top_k": k}:
            return theirs.top_k_sampling_from_probs(probabilities, k)
        case {"top_p": p}:
            return theirs.top_p_sampling_from_probs(probabilities, p)
    return theirs.sampling_from_probs(probabilities)


def _gate(logits: Tensor, settings: dict[str, Any]) -> str:
    """The very tokens of the reference, which the CPU's sampler and its chi-square tests share."""
    for position in range(4):
        found = ops.sample(logits, **settings, seed=1, position=position).tolist()
        with ops.backend("reference"):
            want = ops.sample(logits.cpu(), **settings, seed=1, position=position).tolist()
        require(found == want, f"position {position}: tokens {found}, the reference's are {want}")
    return "the reference's tokens"
