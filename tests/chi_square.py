"""Whether draws follow a distribution: an exact one computed apart from the product, and Pearson's test."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from scipy import stats
from torch import Tensor

# Every option at the value that does nothing, and at one that does.
OPTIONS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
}
ACTIVE: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 9,
    "top_p": 0.8,
    "min_p": 0.08,
    "repetition_penalty": 1.6,
    "presence_penalty": 0.9,
    "frequency_penalty": 0.5,
    "logit_bias": torch.linspace(-1.5, 1.5, 30),
}


def combinations() -> list[dict[str, Any]]:
    """No option, each, all pairs, and all at once."""
    names = [(), *((name,) for name in ACTIVE), *itertools.combinations(ACTIVE, 2), tuple(ACTIVE)]
    return [{name: ACTIVE[name] for name in chosen} for chosen in names]


def exact_distribution(logits: Tensor, history: Tensor, prompt: int, **options: Any) -> Tensor:
    """The distribution [V] in float64, written from the definitions, token by token."""
    o = {**OPTIONS, **options}
    x = logits.double().tolist()
    if o["logit_bias"] is not None:
        x = [a + b for a, b in zip(x, o["logit_bias"].double().tolist(), strict=True)]
    ids = history.tolist()
    for token in set(ids):
        x[token] = x[token] * o["repetition_penalty"] if x[token] < 0 else x[token] / o["repetition_penalty"]
        count = ids[prompt:].count(token)
        if count:
            x[token] -= o["presence_penalty"] + count * o["frequency_penalty"]
    p = torch.softmax(torch.tensor(x, dtype=torch.float64) / o["temperature"], 0)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if o["top_k"]:
        order = order[: o["top_k"]]
    total = sum(p[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass / total >= o["top_p"] and o["top_p"] < 1:
            break
        if p[token] >= o["min_p"] * p[order[0]]:
            kept.append(token)
        mass += float(p[token])
    result = torch.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def p_value(draws: Tensor, probabilities: Tensor) -> float:
    """How likely draws [N] as far as these from their expected counts are; 0 where an impossible one occurs.

    Outcomes expected fewer than 5 times are counted together.
    """
    counts = torch.bincount(draws, minlength=len(probabilities)).double()
    if bool((counts[probabilities == 0] > 0).any()):
        return 0.0
    expected = probabilities * len(draws)
    rare = expected < 5
    observed_bins, expected_bins = counts[~rare].tolist(), expected[~rare].tolist()
    if bool((expected[rare] > 0).any()):
        observed_bins.append(float(counts[rare].sum()))
        expected_bins.append(float(expected[rare].sum()))
    if len(expected_bins) == 1:
        return 1.0
    return float(stats.chisquare(observed_bins, expected_bins).pvalue)
