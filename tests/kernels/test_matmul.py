"""The native product of bfloat16 matrices against float64, by tiles where the processor has them and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.matmul import matmul, worthwhile

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


def _problem(m: int, n: int, k: int, narrow: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.randn(m, k), torch.randn(k, n)
    return a.bfloat16() if narrow[0] else a, b.bfloat16() if narrow[1] else b, torch.randn(n)


def _compare(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    a, b = a.bfloat16().double(), b.bfloat16().double()
    exact = a @ b + (0 if bias is None else bias.double())
    # What float32 sums in any order lose, and one rounding.
    bound = 1e-6 * (a.abs() @ b.abs() + 1) + (exact.abs() / 256 if dtype is torch.bfloat16 else 0)
    assert found.dtype is dtype
    assert ((found.double() - exact).abs() <= bound).all()


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    narrow=st.tuples(st.booleans(), st.booleans()),
    turns=st.tuples(st.booleans(), st.booleans()),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_agrees(
    m: int, n: int, k: int, narrow: Any, turns: tuple[bool, bool], with_bias: bool, dtype: torch.dtype
) -> None:
    a, b, added = _problem(m, n, k, narrow)
    bias = added if with_bias else None
    given_a, given_b = (x.t().contiguous() if turn else x for x, turn in zip((a, b), turns, strict=True))
    _compare(matmul(given_a, given_b, turn_a=turns[0], turn_b=turns[1], bias=bias, dtype=dtype), a, b, bias, dtype)


@pytest.mark.parametrize("fault", ["zeros", "bias left out", "a turned", "one of k left out"])
def test_planted_faults_are_found(fault: str, isa: str) -> None:
    a, b, bias = _problem(33, 40, 33, (False, True))
    found = matmul(a, b, bias=bias, dtype=torch.float32)
    _compare(found, a, b, bias)
    wrong = {
        "zeros": torch.zeros_like(found),
        "bias left out": found - bias,
        "a turned": matmul(a, b, turn_a=True, bias=bias, dtype=torch.float32),
        "one of k left out": found - a[:, 32:] @ b[32:].float(),
    }[fault]
    with pytest.raises(AssertionError):
        _compare(wrong, a, b, bias)


def test_same_bits_for_any_threads_and_rows(isa: str) -> None:
    a, b, _ = _problem(300, 200, 150, (True, False))
    threads, whole = torch.get_num_threads(), matmul(a, b)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(matmul(a, b), whole)
            assert torch.equal(matmul(a[17:18], b), whole[17:18])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays(isa: str) -> None:
    a, b, _ = _problem(40, 40, 64, (False, False))
    a[3, 5], a[7, 9] = torch.nan, torch.inf
    found = matmul(a, b, dtype=torch.float32)
    assert found[3].isnan().all() and found[7].isinf().all()
    assert found[[i for i in range(40) if i not in (3, 7)]].isfinite().all()


def test_a_forced_level_has_no_tiles(isa: str) -> None:
    small, large = torch.empty(8, 8), torch.empty(1024, 1024)
    assert not worthwhile(large)
    if isa != "avx512":
        assert not worthwhile(small)
