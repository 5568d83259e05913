"""Short prompts by recorded steps: to the bit what reading them op by op gives, recorded only where it serves again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY, VOCAB, gpt, llama, spread
from torch import Tensor

from fastlm import backend
from fastlm.generation import Engine, LanguageModel, SamplingParams, prompts
from fastlm.generation.draft_model import quantized_copy
from fastlm.generation.prompts import ShortPrompts
from fastlm.models.base import CausalLM
from fastlm.nn.state import KVCache
from fastlm.reference.linear import FEW_TOKENS

TRANSFORMERS = {name: make for name, make in TINY.items() if name not in ("lstm", "gru")}


def _ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _recorded(model: CausalLM, state: KVCache) -> ShortPrompts:
    """Whose steps have been wanted once already, and were then read op by op."""
    short = ShortPrompts(model, state)
    for width in (FEW_TOKENS // 2, FEW_TOKENS):
        assert short.read(_ids(width), 0) is None
        _op_by_op(model, state, _ids(width), 0)
        state.reset()
    assert state.lengths.tolist() == [0] * state.rows
    return short


def _op_by_op(model: CausalLM, state: KVCache, ids: list[int], row: int) -> tuple[Tensor, Tensor]:
    hidden = model.hidden(torch.tensor([ids]), state.row(row))
    return hidden, model.head(hidden[:, -1:])[:, -1]


@pytest.mark.parametrize("kind", [None, "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.inference_mode()
def test_they_have_the_bits_of_reading_op_by_op(name: str, kind: str | None) -> None:
    """Of every length, the recording's own first; what follows a text that is there already as well."""
    model = spread(TRANSFORMERS[name])
    if kind is not None:
        model = quantized_copy(model, kind)
    states = [model.make_state(3), model.make_state(3)]
    short = _recorded(model, states[0])
    for begins_with in (0, 5):
        for count in range(1, FEW_TOKENS + 1):
            row = count % 3
            for state in states:
                state.reset([row])
                if begins_with:
                    model.hidden(torch.tensor([_ids(begins_with, 1)]), state.row(row))
            found = short.read(_ids(count, count), row)
            want = _op_by_op(model, states[1], _ids(count, count), row)
            assert found is not None and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert states[0].lengths[row] == states[1].lengths[row] == begins_with + count
            after = [_op_by_op(model, state, _ids(7, 2), row) for state in states]
            assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_narrow_caches(kv_dtype: torch.dtype) -> None:
    model = spread(llama)
    states = [model.make_state(1, kv_dtype=kv_dtype) for _ in range(2)]
    assert all(isinstance(state, KVCache) for state in states)
    short = _recorded(model, states[0])  # type: ignore[arg-type]
    for count in (3, 16, 9):
        for state in states:
            state.reset()
        found = short.read(_ids(count), 0)
        want = _op_by_op(model, states[1], _ids(count), 0)  # type: ignore[arg-type]
        assert found is not None and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@torch.inference_mode()
def test_there_is_room_for_the_padding_or_it_is_read_op_by_op() -> None:
    model = spread(gpt)
    state = model.make_state(1, 20)
    short = _recorded(model, state)
    assert short.read(_ids(FEW_TOKENS + 1), 0) is None
    assert short.read(_ids(9), 0) is not None  # 16 of 20
    assert short.read(_ids(9), 0) is None  # 9 + 16
    assert state.lengths.tolist() == [9]
    assert short.read(_ids(5), 0) is not None  # 9 + 8
    assert state.lengths.tolist() == [14]


@torch.inference_mode()
def test_what_cannot_be_recorded_leaves_the_state_as_it_was() -> None:
    class Odd(type(spread(llama))):  # type: ignore[misc]
        def hidden(self, input_ids: Tensor, state: object = None, rows: object = None) -> Tensor:
            return super().hidden(input_ids, state, rows).sin()

    model = spread(lambda: Odd(llama().config))
    state = model.make_state(1)
    short = _recorded(model, state)
    for _ in range(2):
        assert short.read(_ids(4), 0) is None
        assert state.lengths.tolist() == [0]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the steps that were recorded."""
    found: list[int] = []

    class Counted(prompts._Step):
        def __init__(self, model: CausalLM, state: KVCache, width: int, ids: list[int], row: int) -> None:
            found.append(width)
            super().__init__(model, state, width, ids, row)

    monkeypatch.setattr(prompts, "_Step", Counted)
    return found


@pytest.mark.parametrize("make", [gpt, llama])
def test_calls_record_what_they_want_twice(make: Callable[[], CausalLM], recorded: list[int]) -> None:
    model = spread(make)
    lm = LanguageModel(model)
    for count, widths in ((3, []), (12, []), (16, [16]), (8, [16, 8]), (30, [16, 8]), (30, [16, 8]), (5, [16, 8])):
        options = {"max_new_tokens": 6, "seed": 1, "logprobs": True}
        want = LanguageModel(model).generate_ids([_ids(count)], **options)  # type: ignore[arg-type]
        recorded.clear() if not widths else None
        assert lm.generate_ids([_ids(count)], **options) == want  # type: ignore[arg-type]
        assert recorded == widths


def test_requests_that_join_together_keep_their_own_logits(recorded: list[int]) -> None:
    """Each is read by the same recorded step, before any of them is accepted."""
    engine = Engine(spread(llama), rows=3)
    alone = Engine(spread(llama), rows=1)
    params = SamplingParams(seed=4, max_new_tokens=1, logprobs=True)
    asked = [_ids(count, count) for count in (3, 4, 5, 6, 7, 3, 5, 4)]
    for ids in asked:
        engine.submit(ids, params)
    got, want = {}, {}
    while engine.active:
        got.update({token.row: (token.id, token.logprob) for token in engine.step()})
    for at, ids in enumerate(asked):
        alone.submit(ids, params, sequence=0)
        (token,) = alone.step()
        want[at] = token.id, token.logprob
    assert got == want
    assert recorded == [8, 8]


def test_only_where_steps_are_recorded(recorded: list[int]) -> None:
    for options, name in (({"capture": False}, None), ({}, "reference")):
        engine = Engine(spread(gpt), rows=1, **options)  # type: ignore[arg-type]
        for _ in range(3):
            engine.submit([1, 2, 3], SamplingParams(max_new_tokens=2))
            with backend(name) if name else torch.inference_mode():
                while engine.active:
                    engine.step()
    assert recorded == []


def test_planted_fault_padding_left_in_the_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(llama)
    want = LanguageModel(model).generate_ids([[1, 2, 3]], max_new_tokens=10, temperature=0.0)
    read = ShortPrompts.read

    def forgetful(self: ShortPrompts, ids: list[int], row: int) -> object:
        found = read(self, ids, row)
        if found is not None:
            self._state.lengths[row] += 1
        return found

    monkeypatch.setattr(ShortPrompts, "read", forgetful)
    lm = LanguageModel(model)
    texts = [lm.generate_ids([[1, 2, 3]], max_new_tokens=10, temperature=0.0) for _ in range(2)]
    assert texts[0] == want and texts[1] != want
