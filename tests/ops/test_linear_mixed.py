"""Linear layers under autocast: what torch's autocast computes; to the bit where the products are torch's."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn import functional

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu.elementwise import convert

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


def _run(linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 40, 24)])
@pytest.mark.parametrize("products", ["torch", "ours"])
def test_autocast(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    biased: bool,
    products: str,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_mixed"], "worthwhile", lambda _: products == "ours")
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(33, 24), torch.randn(33) if biased else None
    upstream = torch.randn(*shape[:-1], 33).bfloat16()
    found = _run(ops.linear, x, weight, bias, upstream)
    expected = _run(functional.linear, x, weight, bias, upstream)
    exact = _exact(x, weight, bias, upstream)
    for a, b, c in zip(found, expected, exact, strict=True):
        assert a.dtype is b.dtype
        if products == "torch":
            assert torch.equal(a, b)
        else:
            assert_close_to_reference(a, b, c)


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor) -> list[Tensor]:
    """In float64, of the factors rounded to bfloat16."""
    leaves = [t.bfloat16().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = functional.linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.double())]


@pytest.mark.parametrize("fault", ["weight turned", "bias left out", "gradient of another input"])
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_mixed"], "worthwhile", lambda _: True)
    x, weight, bias, upstream = torch.randn(9, 24), torch.randn(24, 24), torch.randn(24), torch.randn(9, 24).bfloat16()
    found = _run(ops.linear, x, weight, bias, upstream)
    expected, exact = _run(functional.linear, x, weight, bias, upstream), _exact(x, weight, bias, upstream)
    if fault == "weight turned":
        found[0] = _run(ops.linear, x, weight.t().contiguous(), bias, upstream)[0]
    elif fault == "bias left out":
        found[0] = (found[0] - bias).bfloat16()
    else:
        found[2] = _run(ops.linear, x.roll(1, 0), weight, bias, upstream)[2]
    with pytest.raises(AssertionError):
        for a, b, c in zip(found, expected, exact, strict=True):
            assert_close_to_reference(a, b, c)


def test_it_is_taken_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(
        sys.modules["fastlm.ops.linear"], "mixed_linear", lambda *a: taken.append(1) or functional.linear(*a)
    )
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    ops.linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            ops.linear(x, weight)
        ops.linear(x, weight.detach())
        with ops.backend("torch"):
            ops.linear(x, weight)
        assert not taken
        ops.linear(x, weight)
    assert taken == [1]


@pytest.mark.parametrize("count", [0, 1, 7, 16, 33, 40_000])
def test_conversions_are_torchs(count: int, isa: str) -> None:
    x = torch.randn(count) * torch.logspace(-40, 38, count) if count else torch.empty(0)
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, 1.00390625, 1.01171875]
    )
    x = torch.cat((x, special))
    y = convert(x, torch.bfloat16)
    same = (y == x.bfloat16()) | (y.isnan() & x.isnan())
    assert same.all() and torch.equal(y.signbit()[:-1], x.signbit()[:-1])
    wide = convert(y, torch.float32)
    assert wide.dtype is torch.float32 and torch.equal(wide[~x.isnan()], y[~x.isnan()].float())
    assert convert(x, torch.float32) is x
    strided = torch.randn(6, 10)[:, ::2]
    assert torch.equal(convert(strided, torch.bfloat16), strided.bfloat16())
