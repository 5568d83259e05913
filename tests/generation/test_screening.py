"""Greedy steps that leave most of the output layer unread: the same tokens, for those requests alone that can."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import TINY, spread
from torch import nn

from fastlm.generation import Engine, SamplingParams, screening
from fastlm.generation.draft_model import quantized_copy
from fastlm.generation.lanes import Request
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
    kept = engine._recordings._all.items()
    return [key[:2] for key, recording in kept if recording.screen is not None and recording.captured]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_TIMES", 0.0)
    monkeypatch.setattr(screening, "_FEWEST", 8)
    monkeypatch.setattr(screening, "_CALLS", 1 << 30)  # so small a head gains little


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
    [{"temperature": 0.5, "seed": 1}, {"logprobs": True}, {"frequency_penalty": 0.5}, {"logit_bias": {3: 2.0}}],
)
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


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("options", [{}, {"draft_tokens": 3, "max_new_tokens": 40}])
def test_stop_tokens_that_come_too_early(model: CausalLM, options: dict[str, Any]) -> None:
    text = generate(Engine(model, rows=1, capture=False), PROMPTS[-1:], max_new_tokens=40)[0]
    for stop in {text[4], text[9], text[-1]}:
        asked = {**options, "min_new_tokens": 14}
        plain = [generate(Engine(model, rows=1, capture=False, stop_ids=[stop]), [p], **asked)[0] for p in PROMPTS]
        assert all(stop not in tokens[:14] for tokens in plain)
        for rows in (1, 2):
            engine = Engine(model, rows=rows, stop_ids=[stop])
            for _ in range(3):
                assert generate(engine, PROMPTS, **asked) == plain
        assert screened(engine)


def test_not_before_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Screen, "seconds", lambda *_: 2.0)
    engine = Engine(spread(TINY["llama"]), rows=1)
    state = engine._recordings.screening
    params = SamplingParams.of(temperature=0)
    request = Request(0, [1], params, 0, None)
    for _ in range(4):
        state.saw(torch.randn(96, 32))
    state.took([request], 99.0, steps=1)
    assert state.screen is None
    state.took([Request(1, [1], SamplingParams.of(temperature=1), 0, None)], 99.0, steps=1)
    assert state.screen is None
    state.took([request], 1.5, steps=1)
    assert state.screen is not None


@pytest.mark.usefixtures("soon")
def test_engines_of_a_model_share_it() -> None:
    model = spread(TINY["llama"])
    first, second = Engine(model, rows=1), Engine(model, rows=2, max_length=64)
    for _ in range(3):
        wanted = generate(first, PROMPTS)
    assert first._recordings.screening.screen is not None
    later = Engine(model, rows=1)
    for engine in (second, later):
        assert engine._recordings.screening.screen is not None
        assert engine._recordings.screening.screen.coarse is first._recordings.screening.screen.coarse
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda engine: generate(engine, PROMPTS), (first, second, later))) == [wanted] * 3
    assert screened(later)
    coarse, known = weakref.ref(later._recordings.screening.screen.coarse), weakref.ref(model)  # type: ignore[union-attr]
    del first, second, later, engine, model
    gc.collect()
    assert known() is None and coarse() is None


@pytest.mark.usefixtures("soon")
def test_weights_that_were_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_FEWEST", 150)  # of few states nothing is known, and all is computed
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    texts = [torch.randint(0, 97, (36,)).tolist() for _ in range(4)]
    for _ in range(2):
        before = [generate(engine, [text]) for text in texts]
    assert screened(engine)
    old = engine._recordings.screening.screen
    with torch.no_grad():
        weight = model.plain_head()[0]  # type: ignore[index]
        weight.mul_(1 + 3 * torch.rand(len(weight), 1))  # type: ignore[union-attr, arg-type]
    wanted = [generate(Engine(model, rows=1, capture=False), [text]) for text in texts]
    assert wanted != before
    for _ in range(3):
        assert [generate(engine, [text]) for text in texts] == wanted
    assert screened(engine) and engine._recordings.screening.screen is not old


@pytest.mark.usefixtures("soon")
def test_planted_fault_a_screen_of_other_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening.Head, "check", lambda _: None)
    with pytest.raises(AssertionError):
        test_weights_that_were_written_to(monkeypatch)


@pytest.mark.usefixtures("soon")
def test_given_up_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_CALLS", 8)
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    monkeypatch.setattr(Screen, "pays", False)
    made: list[Screen] = []
    share = Screen.share
    monkeypatch.setattr(Screen, "share", lambda self: made.append(share(self)) or made[-1])
    for _ in range(3):
        generate(engine, PROMPTS)
    assert len(made) == 1
    assert engine._recordings.screening.screen is None and screened(engine) == []
    monkeypatch.setattr(Screen, "pays", True)
    generate(engine, PROMPTS)
    assert engine._recordings.screening.screen is None
    assert Engine(model, rows=1)._recordings.screening.screen is None


@pytest.mark.usefixtures("soon")
def test_bad_logits_are_refused_as_ever() -> None:
    model = spread(TINY["llama"])
    engine = Engine(model, rows=1)
    for _ in range(3):
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
