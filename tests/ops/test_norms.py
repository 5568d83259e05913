"""ops.layer_norm and ops.rms_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn import functional

from fastlm import ops
from fastlm.reference import layer_norm as layer_norm_reference
from fastlm.reference import rms_norm as rms_norm_reference

Norm = Callable[..., Tensor]
# name: the op, its formula, torch's operator with the same arguments, and the number of parameters
NORMS: dict[str, tuple[Norm, Norm, Norm, int]] = {
    "layer_norm": (
        ops.layer_norm,
        layer_norm_reference.layer_norm,
        lambda x, *p, eps: functional.layer_norm(x, x.shape[-1:], *p, eps=eps),
        2,
    ),
    "rms_norm": (
        ops.rms_norm,
        rms_norm_reference.rms_norm,
        lambda x, *p, eps: functional.rms_norm(x, x.shape[-1:], *p, eps=eps),
        1,
    ),
}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _parameters(norm: str, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(dim, dtype=dtype) for _ in range(NORMS[norm][3])]


def compare(op: Norm, norm: str, x: Tensor, parameters: list[Tensor], eps: float) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    _, formula, torch_op, _ = NORMS[norm]
    exact = formula(x.double(), *(p.double() for p in parameters), eps)
    assert_close_to_reference(op(x, *parameters, eps=eps), torch_op(x, *parameters, eps=eps), exact)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    dim=st.integers(1, 70),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    backend=st.sampled_from(["torch", "reference"]),
    norm=st.sampled_from(sorted(NORMS)),
)
def test_any_shape_stride_and_dtype(
    shape: list[int], dim: int, strided: bool, dtype: torch.dtype, backend: str, norm: str
) -> None:
    x = torch.randn(*shape, dim, 2 if strided else 1).select(-1, 0).to(dtype) + 0.5
    with ops.backend(backend):
        compare(NORMS[norm][0], norm, x, _parameters(norm, dim, dtype), 1e-5)


def test_gradients(norm: str) -> None:
    op, _, torch_op, count = NORMS[norm]
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    parameters = [p.requires_grad_() for p in _parameters(norm, 7, torch.float64)]
    upstream = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.autograd.grad(torch_op(x, *parameters, eps=1e-3), (x, *parameters), upstream)
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            got = torch.autograd.grad(op(x, *parameters, eps=1e-3), (x, *parameters), upstream)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(op(x, eps=1e-3), op(x, *[None] * count, eps=1e-3))


def test_constant_and_large_rows(norm: str) -> None:
    for fill in (0.0, 3.0, 1e4):
        x = torch.full((2, 64), fill)
        assert NORMS[norm][0](x).isfinite().all()
    # The mean square of 1e4 does not fit float16: it has to be taken in float32.
    x = torch.randn(3, 64) * 1e4
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            got = NORMS[norm][0](x.half()).float()
        torch.testing.assert_close(got, NORMS[norm][0](x.half().float()), rtol=2e-3, atol=2e-3)


def test_parameters_of_another_dtype_go_to_the_reference(norm: str) -> None:
    op, formula, _, _ = NORMS[norm]
    x, parameters = torch.randn(3, 8).bfloat16(), _parameters(norm, 8)
    explanation = ops.explain(op, x, *parameters)
    assert explanation.chosen == "reference"
    assert "weight is torch.float32, input torch.bfloat16" in str(explanation)
    exact = formula(x.double(), *(p.double() for p in parameters), 1e-5)
    assert_close_to_reference(op(x, *parameters), exact.bfloat16(), exact)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what the kernels get as output memory with NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: empty_like(*a, **o).fill_(torch.nan))


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 576, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_native(norm: str, isa: str, poisoned: None, dim: int, weighted: bool) -> None:
    op, formula, torch_op, count = NORMS[norm]
    parameters = _parameters(norm, dim) if weighted else [None] * count
    whole = torch.randn(3, 5, 2 * dim) + 0.5
    for x in (whole[..., :dim], whole[0, ..., ::2], whole[0, 0, dim:], whole[:, :0, :dim]):
        exact = formula(x.double(), *(p if p is None else p.double() for p in parameters), 1e-5)
        with ops.backend("cpu"):
            fast = op(x, *parameters, eps=1e-5)
        assert_close_to_reference(fast, torch_op(x, *parameters, eps=1e-5), exact)


def test_a_row_depends_on_that_row_alone(norm: str, isa: str) -> None:
    op = NORMS[norm][0]
    x, parameters = torch.randn(200, 333), _parameters(norm, 333)
    before = torch.get_num_threads()
    try:
        with ops.backend("cpu"):
            torch.set_num_threads(1)
            together = op(x, *parameters)
            torch.set_num_threads(3)
            assert torch.equal(op(x, *parameters), together)
            for row in (0, 7, 199):
                assert torch.equal(op(x[row], *parameters), together[row])
            assert torch.equal(op(x[5:9], *parameters), together[5:9])
    finally:
        torch.set_num_threads(before)


def test_native_steps_aside(norm: str, isa: str) -> None:
    op = NORMS[norm][0]
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert ops.explain(op, x, torch.nn.Parameter(weight)).chosen == "cpu"
    assert ops.explain(op, x.double(), weight.double()).chosen == "torch"
    plain = op(x, weight)
    torch.testing.assert_close(torch.func.vmap(lambda row: op(row, weight))(x), plain)
    _, tangent = torch.func.jvp(lambda x: op(x, weight, eps=0.0), (x,), (x,))
    torch.testing.assert_close(tangent, torch.zeros_like(x), atol=1e-5, rtol=0)  # scaling x changes nothing


def _native_gradients(norm: str, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with ops.backend("cpu"):
        return torch.autograd.grad(NORMS[norm][0](*leaves, eps=0.1), leaves, upstream)


def compare_gradients(norm: str, found: tuple[Tensor, ...], inputs: list[Tensor], upstream: Tensor) -> None:
    """Each gradient against the formula's in float64, bounded by torch's error."""
    torch_op = NORMS[norm][2]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(torch_op(*leaves, eps=0.1), leaves, upstream.to(dtype)))
    for fast, same, exact in zip(found, *results, strict=True):
        assert_close_to_reference(fast, same, exact, floor=2e-6)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 17, 65, 576])
def test_native_gradients(norm: str, isa: str, poisoned: None, dim: int) -> None:
    whole = torch.randn(3, 40, 2 * dim) + 0.5
    for x in (whole[..., :dim], whole[0, :, ::2] if dim > 1 else whole[0, :, :1], whole[0, 0, dim:]):
        inputs, upstream = [x, *_parameters(norm, dim)], torch.randn(x.shape)
        found = _native_gradients(norm, inputs, upstream)
        compare_gradients(norm, found, inputs, upstream)
        # What is not wanted is not computed, and the rest stays as it is.
        only = x.detach().requires_grad_()
        with ops.backend("cpu"):
            y = NORMS[norm][0](only, *inputs[1:], eps=0.1)
        assert torch.equal(torch.autograd.grad(y, only, upstream)[0], found[0])


def test_gradients_do_not_depend_on_threads(norm: str, isa: str) -> None:
    inputs, upstream = [torch.randn(700, 65), *_parameters(norm, 65)], torch.randn(700, 65)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(_native_gradients(norm, inputs, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fault", ["zeros", "mean forgotten", "statistics constant", "weight left out"])
def test_planted_faults_in_gradients_are_found(norm: str, fault: str) -> None:
    inputs, upstream = [torch.randn(30, 33) + 0.5, *_parameters(norm, 33)], torch.randn(30, 33)
    grad_x, *rest = _native_gradients(norm, inputs, upstream)
    compare_gradients(norm, (grad_x, *rest), inputs, upstream)
    x, weight = inputs[:2]
    centred = x - x.mean(-1, keepdim=True) * (norm == "layer_norm")
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 0.1)
    wrong = {
        "zeros": torch.zeros_like(x),
        "mean forgotten": grad_x + (upstream * weight).mean(-1, keepdim=True) * scale,
        "statistics constant": upstream * weight * scale,
        "weight left out": _native_gradients(norm, [x, torch.ones(33), *inputs[2:]], upstream)[0],
    }[fault]
    with pytest.raises(AssertionError):
        compare_gradients(norm, (wrong, *rest), inputs, upstream)


def test_autocast_rounds_once(norm: str, isa: str) -> None:
    op, parameters = NORMS[norm][0], _parameters(norm, 65)
    x, upstream = torch.randn(20, 65), torch.randn(20, 65).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        y = op(*leaves)
    assert torch.equal(y, op(x, *parameters).bfloat16())
    got = torch.autograd.grad(y, leaves, upstream)
    wanted = torch.autograd.grad(op(*leaves), leaves, upstream.float())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b)


def test_no_second_derivative(norm: str) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{norm}: the native kernel has no second derivative"):
        torch.autograd.grad(NORMS[norm][0](x).sum(), x, create_graph=True)


FAULTS: dict[str, Norm] = {
    "zeros": lambda op, x, *p, eps: torch.zeros_like(x),
    "eps outside the root": lambda op, x, *p, eps: op(x, *p, eps=eps * eps),
    "sum for mean": lambda op, x, *p, eps: op(x, *p, eps=eps) / x.shape[-1] ** 0.5,
    "weight left out": lambda op, x, w, *b, eps: op(x, torch.ones_like(w), *b, eps=eps),
    "weight plus one": lambda op, x, w, *b, eps: op(x, w + 1, *b, eps=eps),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(norm: str, fault: str) -> None:
    op = NORMS[norm][0]
    x, parameters = torch.randn(4, 33), _parameters(norm, 33)
    compare(op, norm, x, parameters, 0.1)
    with pytest.raises(AssertionError):
        compare(lambda *a, eps: FAULTS[fault](op, *a, eps=eps), norm, x, parameters, 0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(norm: str, transposed: bool) -> None:
    x = torch.randn(3, 5, 8)
    x = x.transpose(0, 1) if transposed else x
    inputs = [t.requires_grad_() for t in (x, *_parameters(norm, 8))]
    definition = getattr(torch.ops.fastlm, norm).default
    torch.library.opcheck(definition, (*inputs, 1e-5))
    torch.library.opcheck(definition, (inputs[0], *[None] * (len(inputs) - 1), 1e-5))


def test_compiles_in_one_graph(norm: str) -> None:
    op = NORMS[norm][0]
    inputs = [t.requires_grad_() for t in (torch.randn(5, 3, 8).transpose(0, 1), *_parameters(norm, 8))]
    compiled = torch.compile(lambda *t: op(*t) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), op(*inputs) * 2)
    upstream = torch.randn(3, 5, 8)
    fast = torch.autograd.grad(compiled(*inputs), inputs, upstream)
    slow = torch.autograd.grad(op(*inputs) * 2, inputs, upstream)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(norm: str) -> None:
    op: Any = NORMS[norm][0]
    with pytest.raises(ValueError, match=rf"^{norm}: weight is float32 \[4\] on cpu, expected shape \[5\]"):
        op(torch.randn(3, 5), torch.randn(4))
    if norm == "layer_norm":
        with pytest.raises(ValueError, match=r"^layer_norm: bias is float32 \[1, 5\] on cpu, expected shape \[5\]"):
            op(torch.randn(3, 5), None, torch.randn(1, 5))
