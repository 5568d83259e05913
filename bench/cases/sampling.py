"""Sampling a token from logits, against transformers' processors, softmax and multinomial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, require
from fastlm import ops

__all__ = ["SETTINGS", "cases", "draw", "transformers"]

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def transformers(settings: dict[str, Any], device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """The distribution after transformers' processors, as a function of logits [B, V]."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def distribution(logits: Tensor) -> Tensor:
        return processors(ids.expand(logits.shape[0], 1), logits).softmax(dim=-1)

    return distribution


def draw(distribution: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """A token for each row, [B, 1]."""
    return torch.multinomial(distribution(logits), 1)


def cases() -> Iterator[Case]:
    """ops.sample on logits shaped like a language model's: a few likely tokens and a long tail."""
    for vocab, batch in ((50_257, 1), (50_257, 8), (128_256, 1)):
        torch.manual_seed(0)
        logits = torch.randn(batch, vocab) * 2.5
        for name, settings in SETTINGS.items():
            distribution = transformers(settings)

            @cache
            def gate(logits=logits, settings=settings, distribution=distribution) -> None:  # type: ignore[no-untyped-def]
                probabilities = distribution(logits[:1])[0].double()
                draws = torch.cat(
                    [ops.sample(logits[:1], **settings, seed=1, sequence=0, position=at) for at in range(4000)]
                )
                require(bool((probabilities[draws] > 0).all()), "a token outside the kept set was drawn")
                with ops.backend("reference"):
                    again = torch.cat(
                        [ops.sample(logits[:1], **settings, seed=1, sequence=0, position=at) for at in range(50)]
                    )
                require(bool((again == draws[:50]).all()), "draws differ from the reference's")
                # The log-likelihood of the draws against its expectation, in standard errors.
                log_p = probabilities.clamp_min(1e-300).log()
                mean = (probabilities * log_p).sum()
                deviation = ((probabilities * (log_p - mean) ** 2).sum() / len(draws)).sqrt()
                score = float((log_p[draws].mean() - mean) / deviation)
                require(abs(score) < 4.5, f"draws do not follow the distribution ({score:.1f} standard errors)")

            ours = partial(ops.sample, logits, **settings, seed=1)
            theirs = partial(draw, distribution, logits)
            # Not a sampler: what reading the logits once costs. Sampling should stay within three times that. NumPy's,
            # since torch's reductions wake a second thread for microseconds of work.
            read = partial(logits.numpy().max, -1)
            for peer_name, peer, goal in (
                ("transformers + multinomial", theirs, 20.0),
                ("one read (numpy max)", read, 1 / 3),
            ):
                yield Case(
                    name=f"sample, {name}",
                    shape=f"vocabulary {vocab:,}, batch {batch}",
                    peer_name=peer_name,
                    gate=gate,
                    ours=ours,
                    peer=peer,
                    goal=goal,
                    seconds=0.15,
                )
