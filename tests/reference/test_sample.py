"""The specification of sampling, against published vectors, float64 arithmetic and transformers' processors."""

from __future__ import annotations

import itertools

import pytest
import torch
from chi_square import OPTIONS, combinations, exact_distribution, p_value
from torch import Tensor
from transformers.generation import logits_process as hf

from fastlm.reference import philox
from fastlm.reference import sample as reference

# kat_vectors of Random123: counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert philox.philox4x32(counter, key) == expected


def test_every_part_of_the_counter_and_seed_changes_the_draw() -> None:
    high = 1 << 32
    draws = [
        philox.random64(seed, sequence, position, lane)
        for seed, sequence in itertools.product((0, 1, high), repeat=2)
        for position, lane in itertools.product((0, 1), repeat=2)
    ]
    assert len(set(draws)) == len(draws)
    assert philox.random64(-1, -1, 0, 0) == philox.random64(2**64 - 1, 2**64 - 1, 0, 0)


def test_relative_probabilities_are_exponentials() -> None:
    x = torch.cat([torch.tensor([0.0]), -torch.rand(100_000) * 27.5])
    exact = x.double().exp()
    error = (reference.relative_probabilities(x, 1.0).double() / exact - 1).abs()
    # The polynomial in float32, and the rounding of the exponent: of log2(e), and of its product with x.
    assert bool((error <= 2.5e-7 + x.double().abs() * 2.0**-23).all())
    assert reference.relative_probabilities(x, 1.0)[0] == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-3, 1e3, 1e38, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    x = torch.tensor([1.0, 3.4e38, -float("inf"), -3.4e38])
    probabilities = reference.distribution(x, temperature, 0, 1.0, 0.0)
    assert bool(probabilities.isfinite().all())
    assert probabilities[2] == 0
    assert probabilities[1] >= 1 / 3


@pytest.mark.parametrize("options", combinations(), ids=lambda options: "+".join(options) or "none")
def test_distribution_is_exact(options: dict) -> None:
    x, history, prompt = _case()
    expected = exact_distribution(x, history, prompt, **options)
    values = {**OPTIONS, **options}
    penalties = [values[f"{name}_penalty"] for name in ("repetition", "presence", "frequency")]
    processed = reference.processed_logits(x, values["logit_bias"], history, prompt, penalties)
    filters = (values[name] for name in ("temperature", "top_k", "top_p", "min_p"))
    torch.testing.assert_close(reference.distribution(processed, *filters), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_p": 0.6, "top_k": 12, "min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(options: dict) -> None:
    x, _, _ = _case()
    assert p_value(_reference_draws(x, options), _distribution(x, options)) > 1e-3


def test_a_random_number_reused_after_a_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = _case()
    monkeypatch.setattr(reference, "random64", lambda *counter: philox.random64(*counter[:3], 0))
    assert p_value(_reference_draws(x, {"top_p": 0.5}), _distribution(x, {"top_p": 0.5})) < 1e-9


def _case() -> tuple[Tensor, Tensor, int]:
    x = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    return x, torch.tensor([4, 4, 9, 9, 9, 17, 2, 2, 25, 9]), 3


def _distribution(x: Tensor, options: dict) -> Tensor:
    return exact_distribution(x, torch.tensor([], dtype=torch.int64), 0, **options)


def _reference_draws(x: Tensor, options: dict, count: int = 4000) -> Tensor:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k")
    values = [{**OPTIONS, **options}[name] for name in names]
    return reference.sample(x.expand(count, -1), (*values, 7, torch.arange(count), 0), None, None, None, None)


@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_are_those_of_transformers(seed: int) -> None:
    x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(seed)) * 2
    top_k, top_p, min_p = ((300, 1.0, 0.0), (300, 0.9, 0.0), (300, 0.9, 0.02), (0, 0.9, 0.0))[seed % 4]
    processors = [hf.TemperatureLogitsWarper(0.8)]
    if top_k:
        processors.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(hf.MinPLogitsWarper(min_p))
    scores = hf.LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.int64), x)
    assert torch.equal(reference.distribution(x[0], 0.8, top_k, top_p, min_p) > 0, scores[0].isfinite())


def test_penalties_and_bias_are_those_of_transformers() -> None:
    x = torch.randn(1, 50)
    history = torch.tensor([[3, 3, 8, 49]])
    bias = {5: 2.0, 8: -1.5}
    theirs = hf.SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()})(history, x)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(history, theirs)
    dense = torch.zeros(50)
    dense[list(bias)] = torch.tensor(list(bias.values()))
    ours = reference.processed_logits(x[0], dense, history[0], 0, (1.3, 0.0, 0.0))
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=0)
