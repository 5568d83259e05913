"""When to guess, by a simulated clock: what guessing can lose is bounded, and what it can win is won.

The engine is the real one; its recordings are replaced by a script that knows the text and what steps take.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import llama

from fastlm.generation import Engine, SamplingParams, steps
from fastlm.generation.draft import Draft, PromptLookup, Rehearsal
from fastlm.generation.speculative import Pace

PROMPT = [1, 2, 3]
CLOCK = SimpleNamespace(now=0.0)
Text = Callable[[Sequence[int], Sequence[int]], int]
"""The token behind `ids`, and what was guessed to follow."""


class Script:
    """An engine's recordings that take simulated time, in plain steps: a round of guesses 3.4, recording 6."""

    why_not = None
    screening = SimpleNamespace(saw=lambda _: None, took=lambda *_, **__: None, most_ahead=lambda _: None)

    def __init__(self, text: Text, round_cost: float = 3.4, recording: float = 6.0) -> None:
        self.text, self.round_cost, self.recording = text, round_cost, recording
        self.rounds = 0
        self.begun = CLOCK.now
        self.at: dict[int, float] = {}  # when the text had so many tokens
        self.ids: list[int] = []
        self.guesses: list[int] = []
        self.known: dict[int, SimpleNamespace] = {}

    def of(self, requests: Sequence[Any], width: int, *, logits: bool = False) -> Any:
        if width not in self.known:
            lanes = SimpleNamespace(fill=lambda *_: None, sample=lambda _: torch.tensor([self.text(PROMPT, [])]))
            self.known[width] = SimpleNamespace(
                width=width, captured=None, lanes=lanes, logits=torch.zeros(width, 1), hidden=None, screen=None
            )
        return self.known[width]

    def filled(self, requests: Sequence[Any], width: int, guesses: Sequence[int] = ()) -> Any:
        self.ids, self.guesses = list(requests[0].ids), list(guesses)
        return self.of(requests, width)

    def read(self, ids: Sequence[int], row: int) -> None:
        """As if every prompt were read op by op."""

    def record(self, recording: Any) -> None:
        recording.captured = SimpleNamespace(run=lambda times, _: self.run(recording.width, times))
        [tokens] = self.run(recording.width, 1)
        recording.lanes.tokens = torch.tensor(tokens)
        CLOCK.now += self.recording - (1.0 if recording.width == 1 else self.round_cost)

    def run(self, width: int, times: int) -> list[list[int]]:
        self.at[len(self.ids)] = CLOCK.now
        if width > 1:
            CLOCK.now += self.round_cost
            self.rounds += 1
            row = [*self.guesses, *[0] * (width - 1 - len(self.guesses))]
            return [[self.text([*self.ids, *row[:at]], row[at:]) for at in range(width)]]
        CLOCK.now += times
        for _ in range(times):
            self.ids.append(self.text(self.ids, []))
        return [[token] for token in self.ids[-times:]]

    def stale(self) -> None:
        pass


Measure = Callable[..., tuple[float, Script]]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """How many times faster a text comes with guesses than without, by simulated time; and the script it ran by."""

    def run(
        text: Text, tokens: int, draft: Draft | None = None, count: int = 7, round_cost: float = 3.4
    ) -> tuple[float, Script]:
        script = Script(text, round_cost)
        running = Engine(llama().eval(), rows=1)
        for part in (running, running._steps):
            part._max_length, part._recordings = None, script  # type: ignore[assignment]
        running.submit(PROMPT, SamplingParams(max_new_tokens=tokens, draft_tokens=count), draft=draft)
        got = list(PROMPT)
        while running.active:
            got += [token.id for token in running.step(16)]
        assert len(got) == len(PROMPT) + tokens
        if text is not _spiteful:
            assert got == [*PROMPT, *(text(got[:at], []) for at in range(len(PROMPT), len(got)))]
        return (tokens - 2 + script.recording) / (CLOCK.now - script.begun), script

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
    return run


def _noisy(seed: int, tokens: int, noise: float) -> Text:
    """A text in which two tokens decide the next, but for some."""
    draw = random.Random(seed)
    successors: dict[tuple[int, ...], int] = {}
    text = list(PROMPT)
    while len(text) < tokens + 20:
        usual = successors.setdefault(tuple(text[-2:]), draw.randrange(1, 30))
        text.append(usual if draw.random() > noise else draw.randrange(1, 30))
    return lambda ids, _: text[len(ids)]


def _spiteful(ids: Sequence[int], guesses: Sequence[int]) -> int:
    """Repeats itself as long as nobody guesses that it does."""
    return guesses[0] % 17 + 1 if guesses else ids[-5] if len(ids) > 8 else len(ids)


def test_a_text_made_to_deceive_costs_little(measure: Measure) -> None:
    short, long, longer = (measure(_spiteful, tokens) for tokens in (128, 2000, 8000))
    assert short[0] > 0.90 and short[1].rounds >= 2  # recording takes 5 of these 9%
    assert long[0] > 0.97
    assert longer[0] > 0.975 and longer[1].rounds < 5 * long[1].rounds


def test_texts_that_hardly_repeat_lose_next_to_nothing(measure: Measure) -> None:
    gains = sorted(measure(_noisy(seed, 128, noise), 128)[0] for seed in range(20) for noise in (0.1, 0.3, 1.0))
    assert gains[0] > 0.95 and sum(gains) / len(gains) > 0.99


def test_texts_that_repeat_gain(measure: Measure) -> None:
    gains = sorted(measure(_noisy(seed, 1000, 0.03), 1000)[0] for seed in range(10))
    assert gains[0] > 1.1 and sum(gains) / len(gains) > 1.3
    assert measure(_noisy(3, 1000, 0.0), 1000)[0] > 2.0


def test_a_loop_shorter_than_a_round_is_guessed(measure: Measure) -> None:
    assert measure(lambda ids, _: len(ids) % 2, 300)[0] > 1.8


@pytest.mark.parametrize(("count", "round_cost"), [(1, 1.2), (2, 1.6), (3, 1.8)])
def test_few_guesses_a_round_gain_where_rounds_take_little(measure: Measure, count: int, round_cost: float) -> None:
    gain, script = measure(lambda ids, _: len(ids) % 17, 1000, None, count, round_cost)
    assert script.rounds > 300 / count
    assert gain > 0.85 * (count + 1) / round_cost


@pytest.mark.parametrize("failures", [1, 3])
def test_gains_resume_after_failures(measure: Measure, failures: int) -> None:
    """A text that repeats and breaks off, for so many times, and later repeats for good."""
    draw = random.Random(0)
    line = [draw.randrange(1, 1000) for _ in range(40)]
    text = [*PROMPT, *line]
    for at in range(failures):
        text += [*line[: 24 + at], *(draw.randrange(1, 1000) for _ in range(20))]
    repeats = len(text)
    text += line * 9
    gain, script = measure(lambda ids, _: text[len(ids)], len(text) - len(line) - len(PROMPT))  # a round reads on
    assert script.rounds > failures and gain > 1.2
    resumed = min(at for at in script.at if at > repeats + 40)
    end = max(script.at)
    assert (end - resumed) / (script.at[end] - script.at[resumed]) > 2.0  # 2.35 where all are right


def test_a_draft_that_costs_much_rehearses_seldom(measure: Measure) -> None:
    class Slow(PromptLookup):
        def rehearse(self, ids: Sequence[int], prompt_length: int, count: int) -> Rehearsal:
            CLOCK.now += 1.5
            times.append(len(ids))
            return Rehearsal(8, 8, 0)

    for tokens, least in ((128, 0.985), (2000, 0.98)):
        times: list[int] = []
        assert measure(lambda ids, _: 7, tokens, Slow())[0] > least
        assert min(b - a for a, b in pairwise(times)) >= 150 if times[1:] else tokens == 128


def test_nothing_is_begun_for_the_last_few_tokens() -> None:
    pace = Pace()
    pace.plain(0.02, 2)
    pace.rehearsed(0.0, 3, Rehearsal(10, 3, 7))
    assert pace.promising(3, 60, False) and not pace.promising(3, 20, False)
    assert pace.promising(3, 20, True)
    # A draft that has first to read a long text needs as much more to win.
    pace.rehearsed(0.0, 3, Rehearsal(10, 3, 7, seconds=0.2))
    assert not pace.promising(3, 60, False) and pace.promising(3, 150, False)
    pace.join()
    assert not pace.promising(3, 1000, True)


def test_a_good_draft_is_believed_after_its_first_rehearsal() -> None:
    for right, rounds, left, believed, wait in (
        (9, 9 / 7, 118, True, 170),
        (9, 11 / 7, 118, False, 37),  # what would have saved something is tried again sooner
        (8, 2, 118, False, 170),  # unless too little of the text is left by then
        (8, 2, 500, False, 87),
        (0, 10, 500, False, 170),
    ):
        pace = Pace()
        pace.plain(0.2, 10)
        pace.rehearsed(0.034, 7, Rehearsal(10, rounds, right, 0.034))
        assert pace.promising(7, left, False) == believed
        assert abs(pace.waiting - wait) <= 2


def test_a_rehearsal_that_something_held_up_does_not_make_the_draft_a_slow_one() -> None:
    pace = Pace()
    pace.plain(0.2, 10)
    pace.rehearsed(2.0, 7, Rehearsal(10, 9 / 7, 9, 2.0))
    assert pace.promising(7, 118, False)


def test_one_disturbed_round_does_not_end_guessing() -> None:
    pace = Pace()
    pace.plain(0.1, 10)
    pace.rehearsed(0.0, 3, Rehearsal(10, 3, 7))
    assert pace.promising(3, 100, True)
    for seconds in (0.02, 0.02, 0.5, 0.02):
        assert pace.goes_on(3)
        pace.guessed(seconds, 4)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_TRUST", 100.0),  # any promise is believed
        ("_EVIDENCE", 1000.0),  # none is
    ],
)
def test_planted_fault_a_pace_that_believes_too_much_or_too_little_is_seen(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, name: str, fault: float
) -> None:
    monkeypatch.setattr(Pace, name, fault)
    with pytest.raises(AssertionError):
        test_a_text_made_to_deceive_costs_little(measure)
        test_texts_that_repeat_gain(measure)


def test_a_text_after_one_that_paid_is_guessed_at_once_until_a_round_fails() -> None:
    pace = Pace()
    pace.plain(8.0, 8)
    assert not pace.promising(7, 100, recorded=True)  # the first text has to show it
    for _ in range(5):
        pace.guessed(3.0, 8)
    pace.join()
    assert pace.promising(7, 100, recorded=True) and not pace.promising(7, 100, recorded=False)
    assert pace.goes_on(7)
    pace.guessed(3.0, 1)
    assert not pace.goes_on(7) and not pace.promising(7, 100, recorded=True)


def test_the_first_round_of_a_text_counts_but_not_what_its_draft_had_to_read() -> None:
    pace = Pace()
    pace.plain(8.0, 8)
    for _ in range(5):
        pace.guessed(3.0, 8)
    pace.join()
    pace.guessed(50.0, 8, first=True)
    for _ in range(2):  # which what the first one has given can bear
        assert pace.goes_on(7)
        pace.guessed(3.0, 1)
    pace.join()
    pace.guessed(3.0, 1, first=True)
    assert not pace.goes_on(7)


def test_fewer_guesses_than_asked_for_are_not_worth_a_round() -> None:
    pace = Pace()
    assert pace.worth(1)  # what a round takes is not known
    pace.plain(8.0, 8)
    pace.guessed(3.0, 8)
    assert pace.worth(7) and pace.worth(4) and not pace.worth(3)
