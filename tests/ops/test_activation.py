"""gelu and swiglu: the formulas, the bound, gradients, and results that depend on nothing but the element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def compare_gradients(found: Sequence[Tensor], inputs: list[Tensor], upstream: Tensor) -> None:
    """Each gradient against the formula's in float64, bounded by torch's error in the inputs' dtype."""
    results = []
    for dtype in (inputs[0].dtype, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(theirs(*leaves, *[None] * (2 - len(leaves))), leaves, upstream.to(dtype)))
    for fast, same, exact in zip(found, *results, strict=True):
        assert_close_to_reference(fast, same, exact, floor=3e-6)


def native_gradients(inputs: list[Tensor], upstream: Tensor) -> Sequence[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with ops.backend("cpu"):
        return torch.autograd.grad(ours(*leaves, *[None] * (2 - len(leaves))), leaves, upstream)


@needs_native
@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_native_gradients(shape: list[int], gated: bool, dtype: torch.dtype) -> None:
    inputs = [(torch.randn(shape) * 4).to(dtype) for _ in range(2 if gated else 1)]
    upstream = torch.randn(shape).to(dtype)
    compare_gradients(native_gradients(inputs, upstream), inputs, upstream)


@needs_native
@pytest.mark.parametrize("fault", ["zeros", "sigmoid for the slope", "value for the slope", "factor left out"])
def test_planted_faults_in_gradients_are_found(fault: str) -> None:
    x, u, g = torch.randn(3, 40, 20)
    grad_x, grad_u = native_gradients([x, u], g)
    compare_gradients((grad_x, grad_u), [x, u], g)
    wrong = {
        "zeros": torch.zeros_like(x),
        "sigmoid for the slope": g * u * x.sigmoid(),
        "value for the slope": g * u * functional.silu(x),
        "factor left out": native_gradients([x, torch.ones_like(u)], g)[0],
    }[fault]
    with pytest.raises(AssertionError):
        compare_gradients((wrong, grad_u), [x, u], g)


@needs_native
@pytest.mark.parametrize("gated", [False, True])
def test_native_bfloat16_is_the_float_result_rounded(gated: bool, isa: str) -> None:
    x, u = (torch.randn(77) * 4).bfloat16(), torch.randn(77).bfloat16() if gated else None
    with ops.backend("cpu"):
        assert torch.equal(ours(x, u), ours(x.float(), None if u is None else u.float()).bfloat16())
        special = torch.tensor([float("nan"), float("inf"), 3.3e38, -3.3e38]).bfloat16()
        assert torch.equal(ours(special, None).isnan(), torch.tensor([True, False, False, False]))


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
