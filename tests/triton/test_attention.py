"""The Triton attention against the formula in float64: every option with every other, forward and backward."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton_attention import FACTORS, build, compare, pairwise, possible

CASES = pairwise(FACTORS, possible)


def test_the_cases_have_every_pair_of_options() -> None:
    import itertools

    names = list(FACTORS)
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            assert not possible({a: x, b: y}) or any(case[a] == x and case[b] == y for case in CASES), (a, x, b, y)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_pair_of_options(device: str, number: int) -> None:
    compare(build(device, batch=1 + number % 2, **CASES[number]), seed=0x1234567890ABCDE)
