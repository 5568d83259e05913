"""Greedy steps that leave most of the output layer unread: the same tokens, for those requests alone that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, spread
from torch import nn

from fastlm.generation import Engine, SamplingParams, screening
from fastlm.generation.draft_model import quantized_copy
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.ops.greedy import Screen
from fastlm.reference.sample import BadLogits

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason="no native kernels")

PROMPTS = ([1, 2, 3], [7], [5, 4, 3, 2, 1], [1, 2, 3, 1, 2, 3, 1, 2])


def generate(engine: Engine, prompts: Any, **options: Any) -> list[list[int]]:
    options = {"temperature": 0, "max_new_tokens": 24, **options}
    numbers = [engine.submit(prompt, SamplingParams.of(**options)) for prompt in prompts]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.active:
        for token in engine.step(8):
            found[token.row].append(token.id)
    return [found[number] for number in numbers]


def screened(engine: Engine) -> list[tuple[Any, ...]]:
    """Sizes of batch and width of the steps that went by the screen."""
    return [key[:2] for key, recording in engine._recordings._all.items() if recording.screened and recording.captured]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_TOKENS", 20)


@pytest.fixture(params=["gpt", "llama", "llama-window-interleaved", "Q8_0"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    if request.param == "Q8_0":
        return quantized_copy(spread(TINY["llama"]), "Q8_0")
    return spread(TINY[request.param])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("options", [{}, {"draft_tokens": 3}, {"max_new_tokens": 40}])
def test_tokens_are_the_same(model: CausalLM, options: dict[str, Any]) -> None:
    plain = [generate(Engine(model, rows=1, capture=False), [prompt], **options)[0] for prompt in PROMPTS]
    engine = Engine(model, rows=1)
    for _ in range(2):
        assert [generate(engine, [prompt], **options)[0] for prompt in PROMPTS] == plain
    assert (1, 1) in screened(engine)
    together = Engine(model, rows=2)
    for _ in range(2):
        assert generate(together, PROMPTS, **options) == plain
    assert {(1, 1), (2, 1)} & set(screened(together))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5, "seed": 1}, {"logprobs": True}, {"frequency_penalty": 0.5}, {"logit_bias": {3: 2.0}},
     {"min_new_tokens": 3}],
)  # fmt: skip
def test_other_requests_have_all_logits(options: dict[str, Any]) -> None:
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    generate(engine, PROMPTS[:2])
    generate(engine, PROMPTS[:2])
    assert screened(engine) == [(1, 1)]
    calls = engine._recordings.screening.screen.counts.clone()  # type: ignore[union-attr]
    wanted = generate(Engine(model, rows=1, capture=False), PROMPTS[:1], **options)
    assert generate(engine, PROMPTS[:1], **options) == wanted
    assert torch.equal(engine._recordings.screening.screen.counts, calls)  # type: ignore[union-attr]


def test_not_before_it_pays() -> None:
    engine = Engine(spread(TINY["llama"]), rows=1)
    generate(engine, PROMPTS)
    assert screened(engine) == []


@pytest.mark.usefixtures("soon")
def test_given_up_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_CALLS", 8)
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    monkeypatch.setattr(Screen, "pays", False)
    for _ in range(3):
        generate(engine, PROMPTS)
    assert screened(engine)  # was there
    assert engine._recordings.screening.screen is None
    monkeypatch.setattr(Screen, "pays", True)
    generate(engine, PROMPTS)
    assert engine._recordings.screening.screen is None


@pytest.mark.usefixtures("soon")
def test_bad_logits_are_refused_as_ever() -> None:
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    generate(engine, PROMPTS)
    generate(engine, PROMPTS[:1])
    assert screened(engine)
    engine.submit([1, 2, 3], SamplingParams.of(temperature=0, max_new_tokens=8))
    engine.step()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan  # type: ignore[union-attr, operator]
    with pytest.raises(BadLogits, match="NaN"):
        engine.step()


def test_heads_that_are_more_than_a_product_have_none() -> None:
    model = spread(TINY["llama"])
    assert model.plain_head() is not None
    assert isinstance(model.output, nn.Module)
    handle = model.output.register_forward_hook(lambda *_: None)
    assert model.plain_head() is None
    handle.remove()

    class Capped(type(model)):  # type: ignore[misc]
        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            return 30 * torch.tanh(super().head(hidden) / 30)

    model.__class__ = Capped
    assert model.plain_head() is None
