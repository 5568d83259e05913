"""gelu and swiglu: the formulas, the bound, gradients, and results that depend on nothing but the element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn import functional

from fastlm import ops
from fastlm.kernels import native
from fastlm.reference import activation as reference

needs_native = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


def theirs(gate: Tensor, up: Tensor | None) -> Tensor:
    return functional.gelu(gate, approximate="tanh") if up is None else functional.silu(gate) * up


def ours(gate: Tensor, up: Tensor | None) -> Tensor:
    return ops.gelu(gate) if up is None else ops.swiglu(gate, up)


def spec(gate: Tensor, up: Tensor | None) -> Tensor:
    return reference.gelu(gate) if up is None else reference.swiglu(gate, up)


@pytest.mark.parametrize("gated", [False, True])
def test_reference_is_torchs(gated: bool) -> None:
    x, u = torch.randn(3, 50, dtype=torch.float64) * 4, torch.randn(3, 50, dtype=torch.float64) if gated else None
    assert torch.allclose(spec(x, u), theirs(x, u), rtol=1e-13, atol=1e-14)


@needs_native
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), columns=st.integers(1, 70), gated=st.booleans(), transposed=st.booleans())
def test_native_within_the_bound(rows: int, columns: int, gated: bool, transposed: bool) -> None:
    shape = (columns, rows) if transposed else (rows, columns)
    x, u = torch.randn(shape) * 5, torch.randn(shape) if gated else None
    if transposed:
        x, u = x.t(), None if u is None else u.t()
    with ops.backend("cpu"):
        y = ours(x, u)
    # On a single element torch may be exact by luck. GELU's exponent reaches 20, and so many times its rounding shows.
    assert_close_to_reference(y, theirs(x, u), spec(x.double(), None if u is None else u.double()), floor=3e-6)


@needs_native
@pytest.mark.parametrize("gated", [False, True])
def test_an_element_depends_on_itself_alone(gated: bool, isa: str) -> None:
    x, u = torch.randn(100_003) * 4, torch.randn(100_003) if gated else None
    whole = ours(x, u)
    for begin, end in ((0, 1), (1, 5), (99_990, 100_003), (17, 70_000)):
        assert torch.equal(ours(x[begin:end].clone(), None if u is None else u[begin:end].clone()), whole[begin:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ours(x, u), whole)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_extremes(isa: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4, float("inf"), float("nan")])
    one = torch.ones_like(x)
    for found, expected in ((ops.gelu(x), theirs(x, None)), (ops.swiglu(x, one), theirs(x, one))):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_the_bound_catches_faults() -> None:
    x, u = torch.randn(4, 33), torch.randn(4, 33)
    wrong: list[Callable[[], Tensor]] = [
        lambda: torch.zeros_like(x),
        lambda: functional.silu(u) * x,
        lambda: functional.gelu(x) * u,
        lambda: torch.sigmoid(x) * u,
    ]
    for fault in wrong:
        with pytest.raises(AssertionError):
            assert_close_to_reference(fault(), theirs(x, u), spec(x.double(), u.double()))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated: bool) -> None:
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    inputs = (x, u) if gated else (x,)
    assert torch.autograd.gradcheck(ops.swiglu if gated else ops.gelu, inputs)
    assert torch.autograd.gradcheck(reference.swiglu if gated else reference.gelu, inputs)


def test_custom_ops() -> None:
    x, u = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastlm.gelu.default, (x,))
    torch.library.opcheck(torch.ops.fastlm.swiglu.default, (x, u))


def test_native_steps_aside_for_what_torch_must_see(isa: str) -> None:
    x = torch.randn(3, 5)
    plain = ops.gelu(x)
    assert ops.explain(ops.gelu, x).chosen == "cpu"
    assert ops.explain(ops.gelu, x.double()).chosen == "torch"
    torch.testing.assert_close(torch.func.vmap(ops.gelu)(x), plain)
    value, tangent = torch.func.jvp(ops.gelu, (x,), (torch.ones(3, 5),))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(tangent, torch.func.grad(lambda x: ops.gelu(x).sum())(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"gelu: input is int64 \[2\] on cpu, expected floats"):
        ops.gelu(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"swiglu: up is float32 \[3\] on cpu, gate float32 \[2\] on cpu"):
        ops.swiglu(torch.ones(2), torch.ones(3))
