"""The engine that a LanguageModel keeps from one call to the next."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny_models import gpt, llama, lstm, spread

from fastlm import ops
from fastlm.generation import Decoder, LanguageModel, SamplingParams, kept
from fastlm.generation.kept import Kept
from fastlm.generation.recordings import Recordings
from fastlm.models.base import CausalLM

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the steps that were recorded."""
    found: list[int] = []
    record = Recordings.record

    def counted(self: Recordings, recording: object) -> None:
        found.append(recording.lanes.width)  # type: ignore[attr-defined]
        record(self, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(Recordings, "record", counted)
    return found


def _ids(model: CausalLM, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """By a model of its own, so that nothing is left of earlier calls."""
    return LanguageModel(model).generate_ids(prompts, seed=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [gpt, llama])
def test_calls_give_what_they_give_alone_and_record_once(make: Callable[[], CausalLM], recorded: list[int]) -> None:
    model = spread(make)
    lm = LanguageModel(model)
    for options in ({}, {"top_p": 0.9}, {"temperature": 0.0, "max_new_tokens": 9}):
        options = {"max_new_tokens": 20, **options}
        for prompts in (PROMPTS[:1], PROMPTS, PROMPTS[1:2]):
            assert lm.generate_ids(prompts, seed=1, **options) == _ids(model, prompts, **options)
    recorded.clear()
    lm.generate_ids(PROMPTS[:1], max_new_tokens=10, temperature=0.5)
    assert recorded == []


def test_a_draft_model_is_kept_too(recorded: list[int]) -> None:
    model, draft = spread(llama), spread(gpt)
    lm = LanguageModel(model, draft_model=draft)
    want = _ids(model, [[1, 2, 3]], max_new_tokens=40, temperature=0.0)
    assert lm.generate_ids([[1, 2, 3]], max_new_tokens=40, temperature=0.0) == want
    engine = lm._kept._held
    assert lm.generate_ids([[1, 2, 3]], max_new_tokens=40, temperature=0.0) == want
    assert lm._kept._held is engine
    other = _ids(model, [[3, 4, 5, 6]], max_new_tokens=40, temperature=1.0)
    assert lm.generate_ids([[3, 4, 5, 6]], max_new_tokens=40, temperature=1.0, seed=1) == other


CHANGES: dict[str, Callable[[CausalLM], object]] = {
    "in place": lambda model: model.embedding.weight.mul_(-1),
    "replaced": lambda model: setattr(model, "embedding", copy.deepcopy(model.embedding)),
    "hooked": lambda model: model.embedding.register_forward_hook(lambda *_: None),
    "option": lambda model: setattr(model.norm, "eps", 0.5),
    "forward": lambda model: setattr(
        model.embedding, "forward", type(model.embedding).forward.__get__(model.embedding)
    ),
    "set": lambda model: setattr(model.embedding, "weight", torch.nn.Parameter(-model.embedding.weight)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_gets_a_new_engine(change: str) -> None:
    model = spread(llama)
    lm = LanguageModel(model)
    before = lm.generate_ids([[1, 2, 3]], max_new_tokens=20, temperature=0.0)
    engine = lm._kept._held
    with torch.no_grad():
        CHANGES[change](model)
    after = lm.generate_ids([[1, 2, 3]], max_new_tokens=20, temperature=0.0)
    assert lm._kept._held is not engine
    assert after == _ids(model, [[1, 2, 3]], max_new_tokens=20, temperature=0.0)
    assert change in ("replaced", "hooked", "forward", "option") or after != before


def test_planted_fault_an_engine_that_is_kept_whatever_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_same", lambda *_: True)
    with pytest.raises(AssertionError):
        test_a_model_that_has_changed_gets_a_new_engine("set")


def test_options_that_matter_get_a_new_engine() -> None:
    model, holder = spread(llama), Kept()
    options = {"rows": 1, "max_length": 20}
    engine = holder.take(model, **options)  # type: ignore[arg-type]
    for other, same in (
        ({}, True),
        ({"max_length": 30}, True),  # room was made for more
        ({"rows": 2}, False),
        ({"stop_ids": [5]}, False),
        ({"kv_dtype": torch.bfloat16}, False),
        ({"draft_model": model}, False),
        ({"capture": False}, False),
    ):
        holder.give(holder.take(model, **options))  # type: ignore[arg-type]
        engine = holder._held
        assert (holder.take(model, **{**options, **other}) is engine) is same, other  # type: ignore[arg-type]
    assert holder.take(model, **options) is not engine, "lent twice"  # type: ignore[arg-type]


def test_a_forced_backend_is_not_served_by_recordings() -> None:
    model, holder = spread(llama), Kept()
    holder.give(holder.take(model, rows=1, max_length=20))
    engine = holder._held
    with ops.backend("reference"):
        assert holder.take(model, rows=1, max_length=20) is not engine


def test_calls_that_overlap_or_end_early_do_not_meet() -> None:
    model = spread(llama)
    holder, params = Kept(), SamplingParams(max_new_tokens=12, seed=1)
    want = _ids(model, PROMPTS[:1], max_new_tokens=12)
    first = Decoder(model, PROMPTS[:1], params, kept=holder)
    first.step()
    second = Decoder(model, PROMPTS[:1], params, kept=holder)
    got = []
    while second.active:
        got += [token.id for token in second.step(4)]
    assert [got] == want and first.active == (0,)
    third = Decoder(model, PROMPTS[1:2], params, kept=holder)
    third.cancel(0)
    assert third.active == () and third.step() == [] and second.step() == []
    fourth = Decoder(model, PROMPTS[:1], params, kept=holder)
    assert fourth._engine is second._engine and fourth.active == (0,) and second.active == third.active == ()


def test_two_engines_at_once_are_not_mixed_up() -> None:
    model, holder = spread(llama), Kept()
    stopping = holder.take(model, rows=1, max_length=20, stop_ids=[5])
    free = holder.take(model, rows=1, max_length=20)
    holder.give(stopping)
    assert holder.take(model, rows=1, max_length=20) is not stopping
    holder.give(free)
    assert holder.take(model, rows=1, max_length=20) is free


def test_another_hook_in_place_of_one_is_called() -> None:
    model = spread(llama)
    lm = LanguageModel(model)
    for sign in (1.0, -1.0):
        hook = model.embedding.register_forward_hook(lambda _module, _args, output, sign=sign: output * sign)
        got = lm.generate_ids([[1, 2, 3]], max_new_tokens=12, temperature=0.0)
        assert got == _ids(model, [[1, 2, 3]], max_new_tokens=12, temperature=0.0)
        hook.remove()


def test_recurrent_engines_are_not_kept() -> None:
    """Their recordings read packed copies of the weights, which are given up when the weights are written to."""
    model = spread(lstm)
    lm = LanguageModel(model)
    for _ in range(2):
        assert lm.generate_ids([[1, 2]], max_new_tokens=12, seed=1) == _ids(model, [[1, 2]], max_new_tokens=12)
        assert lm._kept._held is None
        for parameter in model.parameters():
            parameter.data.mul_(1.1)


def test_streams_that_are_closed_give_their_engine_back() -> None:
    lm = LanguageModel(spread(llama))
    decoder = Decoder(lm.model, [[1, 2]], SamplingParams(max_new_tokens=20), kept=lm._kept)

    class Assembler:
        stopped = False

        def push(self, token: int) -> str:
            return str(token)

    stream = lm._stream(decoder, Assembler())  # type: ignore[arg-type]
    for _ in range(4):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert lm._kept._held is decoder._engine


def test_copies_are_empty() -> None:
    lm = LanguageModel(spread(llama))
    lm.generate_ids([[1, 2, 3]], max_new_tokens=3)
    assert lm._kept._held is not None
    for twin in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert twin._kept._held is None
        assert twin.generate_ids([[1]], max_new_tokens=3, seed=1) == lm.generate_ids([[1]], max_new_tokens=3, seed=1)
