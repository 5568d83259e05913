"""Continuous batching: whoever else is there, and whenever a request comes, its tokens are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, VOCAB, llama, spread
from torch import Tensor

from fastlm.generation import Engine, SamplingParams
from fastlm.generation import engine as engine_module
from fastlm.generation.draft_model import quantized_copy
from fastlm.generation.recordings import Recordings
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.nn.state import KVCache


@pytest.fixture(params=["gpt", "llama", "lstm"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return spread(TINY[request.param])


# Prompt, options: different ones, so that a lane's options can't be another's.
REQUESTS: list[tuple[list[int], dict[str, object]]] = [
    ([1, 2, 3], {"max_new_tokens": 17, "seed": 1}),
    ([7], {"max_new_tokens": 5, "temperature": 0}),
    ([5, 4, 3, 2, 1], {"max_new_tokens": 11, "seed": 2, "top_p": 0.8, "repetition_penalty": 1.5}),
    ([3] * 20, {"max_new_tokens": 9, "seed": 3, "top_k": 5, "logit_bias": {8: 4.0}}),
    ([11, 12], {"max_new_tokens": 13, "seed": 4, "min_new_tokens": 8, "temperature": 2.0}),
    ([11, 12], {"max_new_tokens": 6, "seed": 4, "frequency_penalty": 0.7, "logprobs": True}),
    ([1, 2, 3, 1, 2, 3], {"max_new_tokens": 20, "seed": 5, "draft_tokens": 3, "temperature": 0}),
]
STOPS = (13, 57, 80)


Tokens = list[tuple[int, float | None, str | None]]


def _collect(engine: Engine, arrivals: list[int], ahead: int = 1) -> dict[int, Tokens]:
    """Submits request n before step arrivals[n], runs until all have ended, and sorts the tokens by request."""
    rows: dict[int, Tokens] = {}
    number, step = 0, 0
    while number < len(arrivals) or engine.active:
        while number < len(arrivals) and arrivals[number] <= step:
            prompt, options = REQUESTS[number]
            assert engine.submit(prompt, SamplingParams.of(**options)) == number
            number += 1
        for token in engine.step(ahead):
            rows.setdefault(token.row, []).append((token.id, token.logprob, token.finish))
        step += 1
    return rows


@pytest.fixture
def alone(model: CausalLM) -> list[Tokens]:
    """Each request's tokens, had it the model to itself and every step run op by op."""
    found = []
    for prompt, options in REQUESTS:
        engine = Engine(model, rows=1, max_length=48, stop_ids=STOPS, capture=False)
        engine.submit(prompt, SamplingParams.of(**options))
        tokens = []
        while engine.active:
            tokens += [(t.id, t.logprob, t.finish) for t in engine.step()]
        found.append(tokens)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "arrivals", [[0] * 7, [0, 0, 3, 4, 4, 9, 15], [0, 6, 12, 18, 24, 30, 36]], ids=["together", "mixed", "one by one"]
)
@pytest.mark.parametrize("ahead", [1, 5])
def test_requests_do_not_notice_each_other(
    model: CausalLM, alone: list[object], rows: int, arrivals: list[int], ahead: int
) -> None:
    engine = Engine(model, rows=rows, max_length=48, stop_ids=STOPS)
    found = _collect(engine, arrivals, ahead)
    assert engine.why_not_captured is None
    assert [found[number] for number in range(len(REQUESTS))] == alone
    assert not engine.active and engine.step() == []


def test_recordings_are_used_again(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    record = Recordings.record
    monkeypatch.setattr(Recordings, "record", lambda self, what: (made.append(what), record(self, what))[1])
    engine = Engine(model, rows=2, max_length=48)
    for number in range(6):
        engine.submit([number + 1, 2], SamplingParams(max_new_tokens=4 + number, seed=number))
    while engine.active:
        engine.step()
    assert len(made) == len({id(what) for what in made}) <= 2


def test_a_cancelled_request_makes_room(model: CausalLM) -> None:
    engine = Engine(model, rows=1, max_length=48)
    first, second = (engine.submit([5, 6], SamplingParams(max_new_tokens=9, seed=1)) for _ in range(2))
    want = [token.id for token in engine.step()]
    assert engine.active == (first, second)
    engine.cancel(first)
    assert engine.active == (second,)
    assert [token.id for token in engine.step()] == want  # the row's past is gone
    third = engine.submit([5], SamplingParams(max_new_tokens=1))
    engine.cancel(third)
    assert engine.active == (second,)


def test_bad_requests_are_refused_and_the_others_go_on(model: CausalLM) -> None:
    engine = Engine(model, rows=2, max_length=20)
    engine.submit([1, 2], SamplingParams(max_new_tokens=3, seed=1))
    with pytest.raises(ValueError, match="prompt 1 has 21 tokens, but the context holds 20"):
        engine.submit([1] * 21, SamplingParams())
    with pytest.raises(ValueError, match="is empty"):
        engine.submit([], SamplingParams())
    for wrong in (VOCAB, -1):
        with pytest.raises(ValueError, match=f"prompt 1: id {wrong} is outside the vocabulary of {VOCAB}"):
            engine.submit([1, wrong], SamplingParams())
    with pytest.raises(ValueError, match=f"token {VOCAB} is outside the vocabulary"):
        engine.submit([1], SamplingParams(logit_bias={VOCAB: 1.0}))
    count = 0
    while engine.active:
        count += len(engine.step())
    assert count == 3


def test_shared_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(TINY["llama"])
    read: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: (read.append(ids.shape[1]), hidden(ids, *rest))[1])
    system = list(range(20, 50))
    prompts = [[*system, 1, 2], [*system, 3], [*system, 1, 2, 4, 5], [9] * 5]
    texts = []
    for reuse in (False, True):
        engine = Engine(model, rows=2, max_length=60, reuse_prefixes=reuse, capture=False)
        read.clear()
        found: dict[int, list[int]] = {}
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_new_tokens=6, temperature=0))
        while engine.active:
            for token in engine.step():
                found.setdefault(token.row, []).append(token.id)
        texts.append(found)
        prefills = [count for count in read if count > 1]
        assert prefills == ([32, 31, 34, 5] if not reuse else [32, 2, 5])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("length", [1, 9, 16, 17, 32, 40])
@pytest.mark.parametrize("kind", [None, "Q8_0", "wide", "F16"])
def test_prompts_read_together_are_read_as_alone(
    kind: str | None, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: their keys and values, their first logits, their tokens."""
    wide = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 2} if kind in ("wide", "F16") else {}
    plain = spread(lambda: llama(**{"intermediate_size": 128 if wide else 64, **wide}))
    model = plain if kind in (None, "wide") else quantized_copy(plain, kind)
    by_tiles = bool(wide) and length >= 32 and native.CPU.module is not None and native.CPU.module.matmul_tiles()
    prompts = [[(7 * row + at * at) % VOCAB for at in range(length)] for row in range(5)]
    shapes: list[tuple[int, ...]] = []

    class Watched(type(model)):  # type: ignore[misc]
        def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
            shapes.append(tuple(ids.shape))
            return super().hidden(ids, *rest)  # type: ignore[no-any-return]

    model.__class__ = Watched

    def run(rows: int) -> tuple[list[list[int]], list[Tensor]]:
        shapes.clear()
        engine = Engine(model, rows=rows)
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_new_tokens=4, seed=1, logprobs=True))
        tokens: list[list[int]] = [[] for _ in prompts]
        found: list[Tensor] = []
        while engine.active:
            for token in engine.step():
                tokens[token.row].append(token.id)
                found.append(torch.tensor(token.logprob))
            if len(found) == rows == 5:
                assert isinstance(engine._state, KVCache)
                found += [t[:, :, :length].clone() for t in (*engine._state.keys, *engine._state.values)]
        return tokens, found

    together = run(5)
    joined = kind == "Q8_0" or by_tiles or length <= 16
    assert ((5, length) in shapes) == joined
    two_at_a_time = run(2)
    assert ((2, length) in shapes) == joined
    monkeypatch.setattr(engine_module, "rows_apart", lambda *_, **__: False)
    monkeypatch.setattr(Recordings, "read", lambda *_: None)  # nor by recorded steps
    alone = run(5)
    assert shapes[:5] == [(1, length)] * 5
    assert alone[0] == together[0] == two_at_a_time[0]
    assert len(alone[1]) > 20 and all(torch.equal(a, b) for a, b in zip(alone[1], together[1], strict=True))


def test_prompts_are_read_together_only_where_that_changes_nothing() -> None:
    """Of more than a few tokens, rows that are not all there are attend in another way than one alone."""
    model = quantized_copy(spread(lambda: llama(intermediate_size=64)), "Q8_0")
    prompts = [[(7 * row + at * at) % VOCAB for at in range(length)] for row, length in enumerate((40, 40, 23))]

    def run(engine: Engine, prompts: list[list[int]]) -> dict[int, list[float | None]]:
        found: dict[int, list[float | None]] = {}
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_new_tokens=4, seed=1, logprobs=True))
        while engine.active:
            for token in engine.step():
                found.setdefault(token.row, []).append(token.logprob)
        return found

    together = run(Engine(model, rows=3), prompts)
    assert [together[row] for row in range(3)] == [run(Engine(model, rows=1), [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("length", [3, 20])
def test_a_prompt_that_cannot_be_drawn_for_does_not_concern_the_others(length: int) -> None:
    model = spread(lambda: llama(intermediate_size=64))
    nothing = dict.fromkeys(range(VOCAB), -torch.inf)

    def run(engine: Engine, found: dict[int, list[int]]) -> dict[int, list[int]]:
        while engine.active:
            for token in engine.step():
                found.setdefault(token.row, []).append(token.id)
        return found

    prompts = [[5] * 4, *([(7 * row + at) % VOCAB for at in range(length)] for row in range(3))]
    options = [{}, {}, {"logit_bias": nothing}, {}]
    engine = Engine(model, rows=4)
    for prompt, own in zip(prompts, options, strict=True):
        engine.submit(prompt, SamplingParams.of(max_new_tokens=6, seed=1, **own))
    with pytest.raises(ValueError, match="-inf"):
        engine.step()
    assert engine.active == (0, 1, 3) and engine._free == [0, 1, 2, 3]
    found = run(engine, {})
    assert sorted(found) == [0, 1, 3]
    for number, tokens in found.items():
        alone = Engine(model, rows=1)
        alone.submit(prompts[number], SamplingParams(max_new_tokens=6, seed=1))
        assert tokens == run(alone, {})[0]
    assert engine.holds(4, 1)


def test_a_pass_over_several_prompts_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_PREFILL_CHUNK", 10)
    engine = Engine(spread(llama), rows=8)
    for length in (4, 4, 4, 3, 3, 4, 12):
        engine.submit([5] * length, SamplingParams(max_new_tokens=2, seed=1))
    groups = []
    while engine._waiting:
        groups.append([len(request.ids) for request in engine._together()])
    assert groups == [[4, 4], [4], [3, 3], [4], [12]]
