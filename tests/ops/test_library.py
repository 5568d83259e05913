"""Custom ops whose backward differentiates their formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.ops.library import autograd_by_reference, needs_grad, tracing


def _formula(x: Tensor, count: int, y: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    z = x[index] ** count
    return (z if y is None else z * y), x.detach().cumsum(0)


@pytest.fixture
def definition() -> Iterator[Any]:
    """fastlm::tested(x, count, y, index): two outputs, the second without a gradient."""

    @torch.library.custom_op("fastlm::tested", mutates_args=())
    def op(x: Tensor, count: int, y: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
        return _formula(x, count, y, index)

    @op.register_fake
    def _(x: Tensor, count: int, y: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    autograd_by_reference(op, _formula, differentiable=(0, 2))
    yield op
    op._lib._destroy()


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_gradients_are_the_formulas(definition: Any, wants: tuple[bool, bool]) -> None:
    x, y = (torch.randn(4, dtype=torch.float64, requires_grad=want) for want in wants)
    index = torch.tensor([2, 0, 0, 1])
    wanted = [t for t in (x, y) if t.requires_grad]
    upstream = torch.randn(4, dtype=torch.float64)
    got = torch.autograd.grad(definition(x, 3, y, index)[0], wanted, upstream)
    expected = torch.autograd.grad(_formula(x, 3, y, index)[0], wanted, upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    if wants[0]:
        torch.library.opcheck(definition, (x, 3, y, index))


def test_an_absent_tensor_has_no_gradient(definition: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    output, unused = definition(x, 2, None, torch.arange(3))
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], 2 * x)
    assert torch.equal(unused, x.detach().cumsum(0))


def test_a_constant_output_has_a_gradient_of_zero(definition: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    _, second = definition(x, 2, None, torch.arange(3))
    gradient = torch.autograd.grad(second.sum(), x)[0]  # the formula says: a constant
    assert torch.equal(gradient, torch.zeros(3))


def test_needs_grad() -> None:
    plain, leaf = torch.randn(2), torch.randn(2, requires_grad=True)
    assert needs_grad(plain, None, leaf)
    assert needs_grad(leaf * 2)
    assert not needs_grad(plain, None)
    with torch.no_grad():
        assert not needs_grad(leaf)


def test_tracing_is_seen_by_the_tracer_alone() -> None:
    assert not tracing()
    compiled = torch.compile(lambda x: x + 1 if tracing() else x, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(())) == 1
