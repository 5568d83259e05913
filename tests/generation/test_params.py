"""Options out of range are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastlm.generation import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 1000),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        SamplingParams(**{name: value})


def test_one_stop_string_is_not_a_list_of_letters() -> None:
    assert SamplingParams.of(stop="END").stop == ("END",)
    assert SamplingParams.of(stop=["END", "\n"]).stop == ("END", "\n")


def test_a_seed_left_to_chance_differs_between_runs() -> None:
    assert SamplingParams().with_seed().seed != SamplingParams().with_seed().seed
    assert SamplingParams(seed=3).with_seed().seed == 3
