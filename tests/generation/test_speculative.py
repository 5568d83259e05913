"""Guessed tokens: what comes out is what would have come without, and the guesses are the ones to make."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from logits import mean_kl
from tiny_models import VOCAB, gpt, llama, lstm, spread

from fastlm.generation import Decoder, Engine, LanguageModel, SamplingParams, steps
from fastlm.generation.draft import Draft, DraftEnded, PromptLookup, Rehearsal
from fastlm.generation.draft_model import ModelDraft, quantized_copy
from fastlm.generation.params import MOST_DRAFTS
from fastlm.generation.speculative import Pace
from fastlm.models.base import CausalLM
from fastlm.models.llama import Llama, LlamaConfig


@pytest.fixture(params=[gpt, lambda: llama(window=9)], ids=["gpt", "llama-window"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return spread(request.param)


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, a round and a rehearsal take a microsecond each, whatever else the machine does: whether guessing pays is
    `test_pace`'s question."""
    ticks = itertools.count()
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: 1e-6 * next(ticks)))


class Oracle:
    """Guesses from what the model is going to say, every `wrong`th token changed; counts what it is asked."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self.text = [
            (token + 1) % VOCAB if wrong and at % wrong == wrong - 1 else token for at, token in enumerate(text)
        ]
        self.asked: list[int] = []
        self.promises = 100

    def rehearse(self, ids: Sequence[int], prompt_length: int, count: int) -> Rehearsal:
        return Rehearsal(1, 0, self.promises)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        self.asked.append(len(ids))
        return self.text[len(ids) : len(ids) + count]


def _run(
    model: CausalLM, prompt: list[int], draft: Draft | None = None, stop: Sequence[int] = (), **options: object
) -> list[tuple[int, float | None, str | None]]:
    decoder = Decoder(model, [prompt], SamplingParams.of(seed=3, **options), stop_ids=stop, draft=draft)
    tokens = []
    while decoder.active:
        tokens += [(t.id, t.logprob, t.finish) for t in decoder.step(4)]
    return tokens


OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "top-p": {"top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4},
    "min-new": {"min_new_tokens": 17, "temperature": 2.0},
    "logprobs": {"logprobs": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong", [0, 1, 3, 7])
@pytest.mark.parametrize("count", [1, 4, MOST_DRAFTS])
def test_guesses_change_nothing(model: CausalLM, options: str, wrong: int, count: int) -> None:
    prompt = [1, 2, 3, 4, 5]
    want = _run(model, prompt, max_new_tokens=40, **OPTIONS[options])
    draft = Oracle([*prompt, *(token for token, _, _ in want)], wrong)
    got = _run(model, prompt, draft, max_new_tokens=40, draft_tokens=count, **OPTIONS[options])
    assert [(token, finish) for token, _, finish in got] == [(token, finish) for token, _, finish in want]
    if options == "logprobs":
        torch.testing.assert_close(torch.tensor([p for _, p, _ in got]), torch.tensor([p for _, p, _ in want]))
    assert draft.asked


def test_right_guesses_save_steps(model: CausalLM) -> None:
    prompt = [1, 2, 3]
    want = _run(model, prompt, max_new_tokens=42, temperature=0)
    draft = Oracle([*prompt, *(token for token, _, _ in want)], 0)
    decoder = Decoder(model, [prompt], SamplingParams.of(max_new_tokens=42, temperature=0, draft_tokens=4), draft=draft)
    steps = []
    while decoder.active:
        steps.append([token.id for token in decoder.step()])
    assert [token for step in steps for token in step] == [token for token, _, _ in want]
    assert [len(step) for step in steps[:4]] == [1, 1, 1, 5]
    assert decoder.why_not_captured is None


def test_the_last_tokens_are_guessed_too(model: CausalLM) -> None:
    prompt = [1, 2, 3]
    want = _run(model, prompt, max_new_tokens=43, temperature=0)
    draft = Oracle([*prompt, *(token for token, _, _ in want)], 0)
    params = SamplingParams.of(max_new_tokens=43, temperature=0, draft_tokens=7)
    decoder = Decoder(model, [prompt], params, draft=draft)
    steps = []
    while decoder.active:
        steps.append([token.id for token in decoder.step()])
    assert [token for step in steps for token in step] == [token for token, _, _ in want]
    assert [len(step) for step in steps] == [1, 1, 1, *[8] * 5]


def test_a_stop_token_among_the_guesses_ends_the_row(model: CausalLM) -> None:
    prompt = [1, 2, 3]
    free = _run(model, prompt, max_new_tokens=30, temperature=3.0)
    stop = next(token for at, (token, _, _) in enumerate(free) if at > 5 and token not in [t for t, _, _ in free[:at]])
    want = _run(model, prompt, stop=[stop], max_new_tokens=30, temperature=3.0)
    draft = Oracle([*prompt, *(token for token, _, _ in free)], 0)
    got = _run(model, prompt, draft, [stop], max_new_tokens=30, temperature=3.0, draft_tokens=7)
    assert got == want and want[-1][0] == stop and want[-1][2] == "stop"


def test_the_context_can_be_filled_to_the_end(model: CausalLM) -> None:
    prompt = [1] * 50
    want = _run(model, prompt, max_new_tokens=40)
    draft = Oracle([*prompt, *(token for token, _, _ in want)], 0)
    assert _run(model, prompt, draft, max_new_tokens=40, draft_tokens=5) == want
    assert len(want) == 15 and want[-1][2] == "context"


def test_batches_and_recurrent_models_do_without() -> None:
    recurrent = spread(lstm)
    want = _run(recurrent, [1, 2, 1, 2, 1, 2], max_new_tokens=12)
    assert _run(recurrent, [1, 2, 1, 2, 1, 2], max_new_tokens=12, draft_tokens=3) == want
    transformer = llama().eval()
    both = []
    for count in (0, 3):
        decoder = Decoder(
            transformer, [[1, 2, 1, 2], [3]], SamplingParams.of(max_new_tokens=9, draft_tokens=count, seed=1)
        )
        tokens = []
        while decoder.active:
            tokens += decoder.step()
        both.append(tokens)
    assert both[0] == both[1]


@pytest.mark.parametrize("count", [-1, MOST_DRAFTS + 1])
def test_a_wrong_number_is_named(count: int) -> None:
    with pytest.raises(ValueError, match=f"draft_tokens: {count} is not between 0 and {MOST_DRAFTS}"):
        SamplingParams(draft_tokens=count)


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),  # three agree: three guesses
        ([1, 2, 3, 4], []),
        ([1, 2, 3], []),
        ([7, 1, 2, 3, 10, 8, 1, 2, 3, 20, 7, 1, 2, 3], [10, 8, 1, 2]),  # longer agreement wins over the later place
        ([1, 2, 3, 10, 1, 2, 3, 20, 1, 2, 3], [20, 1, 2]),  # of equal ones the later
        ([5, 5, 5, 5, 5], [5, 5, 5, 5]),  # round and round
        ([7, 8, 7, 8, 7, 8], [7, 8, 7, 8]),
    ],
)
def test_prompt_lookup(ids: list[int], want: list[int]) -> None:
    assert PromptLookup().propose(ids, 4) == want
    growing = PromptLookup()
    for end in range(len(ids)):
        growing.propose(ids[:end], 4)
    assert growing.propose(ids, 4) == want


def test_lookup_rehearses_what_it_would_have_proposed() -> None:
    torch.manual_seed(0)
    for period in (7, 13, 200):
        text = torch.randint(0, 5 if period == 200 else 50, (period,)).tolist() * (400 // period)
        text[350:] = torch.randint(0, 5, (len(text) - 350,)).tolist()
        rounds = right = 0
        at, plain = 100 - 64, PromptLookup()
        while at < len(text):
            guesses = plain.propose(text[:at], 4)
            found = 0
            while found < len(guesses) and guesses[found : found + 1] == text[at + found : at + found + 1]:
                found += 1
            if guesses and found < len(guesses) and at + found == len(text):
                break
            rounds, right, at = rounds + bool(guesses), right + found, at + found + 1
        once = PromptLookup().rehearse(text, 100, 4)
        assert (once.rounds, once.right, once.seconds) == (rounds, right, 0)
        bit_by_bit, total = PromptLookup(), [0, 0, 0]
        for end in range(100, len(text) + 1):
            total = [a + b for a, b in zip(total, bit_by_bit.rehearse(text[:end], 100, 4)[:3], strict=True)]
        assert total == list(once[:3])
        assert right > 0 and (period == 200 or right > 150)


@pytest.mark.parametrize("options", ["greedy", "penalties", "top-p"])
@pytest.mark.parametrize("make", [llama, lstm])
def test_a_model_rehearses_what_it_would_have_proposed(make: Callable[[], CausalLM], options: str) -> None:
    model = spread(make)
    params = SamplingParams(seed=3, **OPTIONS[options])
    text = [1, 2, 3, *(token for token, _, _ in _run(model, [1, 2, 3], max_new_tokens=15, **OPTIONS[options]))]
    assert ModelDraft(model, params).rehearse(text, 3, 2)[:3] == (15, 5, 10)
    wrong = list(text)
    wrong[9] = (wrong[9] + 7) % VOCAB  # a guess, and not the token behind a round
    draft = ModelDraft(model, params)
    assert draft.rehearse(text[:8], 3, 2) == Rehearsal()  # too little to judge by
    tokens, rounds, _, _ = draft.rehearse(wrong, 3, 2)
    assert tokens == 15 and rounds > 5
    assert draft.rehearse([*wrong, 5], 3, 2) == Rehearsal()


def test_nothing_is_recorded_for_guesses_that_are_never_right(model: CausalLM) -> None:
    draft = Oracle(range(100), 0)
    draft.promises = 0
    decoder = Decoder(model, [[1, 2, 3]], SamplingParams.of(seed=3, max_new_tokens=40, draft_tokens=4), draft=draft)
    while decoder.active:
        decoder.step(4)
    assert not draft.asked
    places = decoder._engine._recordings._all.values()
    assert [place.lanes.width for place in places if place.captured is not None] == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("small", [gpt, llama, lstm, "Q8_0"])
def test_a_model_guesses_for_another(model: CausalLM, small: Callable[[], CausalLM] | str, temperature: float) -> None:
    draft = quantized_copy(model, small) if isinstance(small, str) else spread(small)
    options = {"max_new_tokens": 50, "temperature": temperature}
    want = _run(model, [1, 2, 3], **options)
    for count in (1, 4):
        decoder = Decoder(
            model, [[1, 2, 3]], SamplingParams.of(seed=3, draft_tokens=count, **options), draft_model=draft
        )
        decoder._engine._steps.pace = Always()
        got, steps = [], 0
        while decoder.active:
            got += decoder.step()
            steps += 1
        assert [token.id for token in got] == [token for token, _, _ in want]
        if small == "Q8_0":
            assert steps < 0.75 * len(want)


class Always(Pace):
    """No pause."""

    waiting = 0  # type: ignore[assignment]

    def promising(self, count: int, left: int, recorded: bool) -> bool:
        return True

    def goes_on(self, count: int) -> bool:
        return True


@pytest.mark.parametrize("make", [llama, lstm, gpt])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_says_what_its_model_would_wherever_the_text_goes(
    make: Callable[[], CausalLM], temperature: float
) -> None:
    model, params = spread(make), SamplingParams(temperature=temperature, seed=5)
    draft, ids = ModelDraft(model, params), [1, 2, 3]

    def fresh(ids: list[int], count: int) -> list[int]:
        engine = Engine(model, rows=1, capture=False)
        engine.submit(ids, replace(params, max_new_tokens=count))
        found: list[int] = []
        while engine.active:
            found += [token.id for token in engine.step()]
        return found

    # All right; the first wrong; some right; none asked for a while.
    for count, right, more in ((4, 4, 1), (4, 0, 1), (4, 2, 1), (3, 3, 1), (2, 1, 9), (5, 5, 1), (1, 0, 1)):
        guesses = draft.propose(ids, count)
        assert guesses == fresh(ids, count)[: len(guesses)] and len(guesses) >= min(count, 3)
        ids = ids + guesses[:right] + [(guesses[right] + 1 if right < count else 7) % VOCAB, *range(2, more + 1)]
    small = ModelDraft(model, params, engine=ModelDraft.engine(model, 10))
    assert small.propose(list(range(7)), 3)
    with pytest.raises(DraftEnded):
        small.propose(list(range(8)), 3)


def test_a_draft_that_is_often_wrong_guesses_less_at_a_time() -> None:
    draft, ids = ModelDraft(spread(llama)), [1, 2, 3]
    made = []
    for right in (0, 0, 0, 0, *[7] * 11):
        guesses = draft.propose(ids, 7)
        made.append(len(guesses))
        ids = [*ids, *guesses[:right], *([(guesses[right] + 1) % VOCAB] if right < len(guesses) else [])]
    assert made[0] == 7 and made[4] <= 2 and made[-1] >= 4, made


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    other = Llama(LlamaConfig(vocab_size=50, context_length=64, num_layers=1, num_heads=2, hidden_size=8))
    with pytest.raises(ValueError, match=f"draft_model: its vocabulary has 50 tokens, the model's {VOCAB}"):
        LanguageModel(llama(), draft_model=other)


def test_an_engine_rewrites_active_requests_only() -> None:
    engine = Engine(llama().eval(), rows=1, rewritable=True)
    with pytest.raises(ValueError, match="request 0 is not active"):
        engine.rewrite(0, [1, 2])
    recurrent = Engine(spread(lstm), rows=1, rewritable=True)
    recurrent.submit([1, 2, 3], SamplingParams())
    recurrent.step()
    with pytest.raises(ValueError, match="the state after 1 tokens was not kept"):
        recurrent.rewrite(0, [1, 9])


def test_a_quantized_copy_shares_what_it_can(model: CausalLM) -> None:
    small = quantized_copy(model, "Q8_0")
    assert {p.data_ptr() for p in small.parameters()} <= {p.data_ptr() for p in model.parameters()}
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert 0 < mean_kl(model(ids), small(ids)) < 0.1
    with pytest.raises(ValueError, match="kind is 'Q9'"):
        quantized_copy(model, "Q9")


def test_a_text_longer_than_its_draft_can_read_goes_on_without_it(model: CausalLM) -> None:
    params = SamplingParams.of(seed=3, max_new_tokens=60, draft_tokens=4, temperature=0.0)
    small = quantized_copy(model, "Q8_0")
    draft = ModelDraft(small, params, engine=ModelDraft.engine(small, 24))
    decoder = Decoder(model, [[1, 2, 3]], params, draft=draft)
    decoder._engine._steps.pace = Always()
    got: list[int] = []
    at_once = []
    while decoder.active:
        found = decoder.step(8)
        got += [token.id for token in found]
        at_once.append(len(found))
    assert got == [token for token, _, _ in _run(model, [1, 2, 3], max_new_tokens=60, temperature=0.0)]
    assert 8 in at_once[:-1]  # where guesses might come any time, plain steps go one by one


def _unreadable(model: CausalLM, token: int) -> CausalLM:
    """The model, but for a token that makes everything behind it NaN."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embedding.weight[token] = torch.nan  # type: ignore[union-attr]
    return broken


@pytest.mark.parametrize("at", [1, 12, 30])
def test_a_draft_model_that_fails_ends_the_drafting_alone(at: int) -> None:
    """In a rehearsal, while it reads, and in a replay."""
    model, prompt = spread(lambda: llama(tie_embeddings=False)), [1, 2, 3]
    want = _run(model, prompt, max_new_tokens=50, temperature=1.0)
    token = next(t for here, (t, _, _) in enumerate(want) if here >= at and t not in [t for t, _, _ in want[:here]])
    params = SamplingParams.of(seed=3, max_new_tokens=50, draft_tokens=3)
    decoder = Decoder(model, [prompt], params, draft_model=_unreadable(model, token))
    decoder._engine._steps.pace = Always()
    got = []
    while decoder.active:
        got += [(t.id, t.logprob, t.finish) for t in decoder.step(4)]
    assert got == want and decoder.why_not_captured is None


@pytest.mark.parametrize("when", [0, 20])
def test_logits_that_fail_behind_a_wrong_guess_end_the_drafting_alone(when: int) -> None:
    """Where the confirming step is recorded, and where it is replayed."""
    model, prompt = spread(lambda: llama(tie_embeddings=False)), [1, 2, 3]
    want = _run(model, prompt, max_new_tokens=40)
    said = [*prompt, *(token for token, _, _ in want)]
    never = next(token for token in range(VOCAB) if token not in said)
    draft = Oracle(said, 0)
    draft.text[when + 6 :] = [never] * len(draft.text[when + 6 :])
    assert _run(_unreadable(model, never), prompt, draft, max_new_tokens=40, draft_tokens=4) == want
    assert draft.asked and draft.asked[-1] <= max(9, when + 7)


def test_a_text_that_fails_says_so_with_guesses_as_without() -> None:
    model, prompt = spread(lambda: llama(tie_embeddings=False)), [1, 2, 3]
    want = _run(model, prompt, max_new_tokens=40)
    said = [*prompt, *(token for token, _, _ in want)]
    token = next(t for at, t in enumerate(said) if at > 20 and t not in said[:at])
    for count in (0, 4):
        with pytest.raises(ValueError, match="sample: row 0: the logit of token 0 is NaN"):
            _run(_unreadable(model, token), prompt, Oracle(said, 0), max_new_tokens=40, draft_tokens=count)


def test_a_rewrite_that_fails_says_so() -> None:
    model = _unreadable(spread(lambda: llama(tie_embeddings=False)), 9)
    engine = Engine(model, rows=1, rewritable=True)
    engine.submit([1, 2, 3], SamplingParams(temperature=0.0, logit_bias={9: -1e4}))
    ids = [1, 2, 3, *(engine.step()[0].id for _ in range(4))]
    with pytest.raises(ValueError, match="sample: row 0: the logit of token 0 is NaN"):
        engine.rewrite(0, [*ids[:-1], 9, 5])


def test_planted_fault_guesses_left_in_the_cache_are_seen(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    guess = steps.Steps._guess

    def forgetful(self: steps.Steps, request: steps.Request) -> object:
        found = guess(self, request)
        if found and not left:  # once: the cache has to be large enough for it
            self._state.lengths[request.slot] += 1
            left.append(request)
        return found

    left: list[object] = []

    prompt = [1, 2, 3, 4, 5]
    want = _run(model, prompt, max_new_tokens=30)
    monkeypatch.setattr(steps.Steps, "_guess", forgetful)
    draft = Oracle([*prompt, *(token for token, _, _ in want)], 3)
    got = _run(model, prompt, draft, stop=[want[20][0]], max_new_tokens=30, draft_tokens=4)
    assert left and got != want[: len(got)]
