"""ops.add_layer_norm and ops.add_rms_norm: the bits of an addition and a norm, with gradients through both results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.reference import layer_norm as layer_norm_reference
from fastlm.reference import rms_norm as rms_norm_reference

Both = Callable[..., tuple[Tensor, Tensor]]
# name: the op, its formula, the norm alone, and the number of parameters
NORMS: dict[str, tuple[Both, Both, Callable[..., Tensor], int]] = {
    "add_layer_norm": (ops.add_layer_norm, layer_norm_reference.add_layer_norm, ops.layer_norm, 2),
    "add_rms_norm": (ops.add_rms_norm, rms_norm_reference.add_rms_norm, ops.rms_norm, 1),
}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _case(norm: str, *shape: int, branch: torch.dtype = torch.float32) -> list[Tensor]:
    """What a block gives, the stream it adds to, and parameters, all of which want gradients."""
    count = NORMS[norm][3]
    tensors = [torch.randn(shape).to(branch), torch.randn(shape) + 0.5, *(torch.randn(shape[-1]) for _ in range(count))]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", [(1,), (3, 5, 17), (40, 64), (0, 8), (700, 65)])
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
def test_native_is_add_then_norm(norm: str, isa: str, shape: tuple[int, ...], branch: torch.dtype) -> None:
    op, _, alone, _ = NORMS[norm]
    tensors = _case(norm, *shape, branch=branch)
    with ops.backend("cpu"):
        output, total = op(*tensors, eps=0.1)
        assert torch.equal(total, tensors[0] + tensors[1])
        leaf = total.detach().requires_grad_()
        plain = alone(leaf, *tensors[2:], eps=0.1)
    assert torch.equal(output, plain)
    ups = torch.randn(shape), torch.randn(shape)
    found = torch.autograd.grad((output, total), tensors, ups, retain_graph=True)
    wanted = torch.autograd.grad(plain, (leaf, *tensors[2:]), ups[0])
    into = wanted[0] + ups[1]
    for grad, want in zip(found, (into, into, *wanted[1:]), strict=True):
        assert grad.dtype is (branch if grad is found[0] else torch.float32)
        rtol = 1e-6 if grad.dtype is torch.float32 else 8e-3
        torch.testing.assert_close(grad, want.to(grad.dtype), rtol=rtol, atol=1e-6)
    for grad in torch.autograd.grad(total, tensors[:2], ups[1], retain_graph=True):
        assert torch.equal(grad, ups[1].to(grad.dtype))
    with torch.no_grad(), ops.backend("cpu"):
        assert all(torch.equal(a, b) for a, b in zip(op(*tensors, eps=0.1), (output, total), strict=True))


def compare(run: Both, norm: str, tensors: list[Tensor]) -> None:
    """Results and gradients against the formula in float64: what every planted fault must turn red."""
    ups = [torch.randn(tensors[0].shape) for _ in range(2)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    narrow = [t.detach().requires_grad_() for t in tensors]
    with ops.backend("reference"):
        same, exact = (NORMS[norm][0](*leaves, eps=0.1) for leaves in (narrow, wide))
    got = run(*tensors, eps=0.1)
    results = [
        [*found, *torch.autograd.grad(found, leaves, [u.to(found[0].dtype) for u in ups])]
        for found, leaves in ((got, tensors), (same, narrow), (exact, wide))
    ]
    for fast, plain, right in zip(*results, strict=True):
        assert_close_to_reference(fast.detach(), plain.detach(), right.detach(), floor=2e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dim", [3, 33, 64])
def test_results_and_gradients(norm: str, backend: str, dim: int) -> None:
    with ops.backend(backend):
        compare(NORMS[norm][0], norm, _case(norm, 2, 9, dim))


def _halved(x: Tensor) -> Tensor:
    """x, with half its gradient."""
    return x.detach() + (x - x.detach()) / 2


FAULTS: dict[str, Any] = {
    "residual left out": lambda op, a, b, *p, eps: op(a, 0 * b, *p, eps=eps),
    "results swapped": lambda op, a, b, *p, eps: op(a, b, *p, eps=eps)[::-1],
    "sum before the addition": lambda op, a, b, *p, eps: (op(a, b, *p, eps=eps)[0], b + 0 * a),
    "gradient of the sum left out": lambda op, a, b, *p, eps: (op(a, b, *p, eps=eps)[0], (a + b).detach() + 0 * a),
    "gradient of the input alone": lambda op, a, b, *p, eps: op(a, b.detach() + 0 * b, *p, eps=eps),
    "gradient of the sum twice": lambda op, a, b, *p, eps: op(_halved(a), _halved(b), *p, eps=eps),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(norm: str, fault: str) -> None:
    tensors = _case(norm, 6, 33)
    with pytest.raises(AssertionError):
        compare(lambda *a, eps: FAULTS[fault](NORMS[norm][0], *a, eps=eps), norm, tensors)


def test_who_serves(norm: str) -> None:
    op = NORMS[norm][0]
    x = torch.randn(2, 8)
    assert ops.explain(op, x, x).chosen == "cpu"
    assert ops.explain(op, x.bfloat16(), x).chosen == "cpu"
    assert ops.explain(op, x, x.double()).chosen == "torch"
    assert ops.explain(op, x.half(), x.half()).chosen == "torch"


def test_second_derivatives_are_refused(norm: str) -> None:
    tensors = _case(norm, 3, 8)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(NORMS[norm][0](*tensors)[0].sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(norm: str, branch: torch.dtype) -> None:
    op = NORMS[norm][0]
    tensors = _case(norm, 3, 5, 8, branch=branch)
    torch.library.opcheck(getattr(torch.ops.fastlm, norm).default, (*tensors, 1e-5))
    compiled = torch.compile(lambda *t: op(*t), fullgraph=True, backend="aot_eager")
    results = [
        [*found, *torch.autograd.grad(found, tensors, [torch.ones_like(f) for f in found])]
        for found in (compiled(*tensors), op(*tensors))
    ]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_autocast_normalises_to_bfloat16_and_keeps_the_sum(norm: str, isa: str) -> None:
    tensors = _case(norm, 20, 65, branch=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, total = NORMS[norm][0](*tensors)
    wide, same = NORMS[norm][0](*tensors)
    assert total.dtype is torch.float32 and torch.equal(total, same)
    assert torch.equal(output, wide.bfloat16())


def test_errors_name_the_argument(norm: str) -> None:
    op = NORMS[norm][0]
    with pytest.raises(ValueError, match=rf"^{norm}: residual is float32 \[5\] on cpu, expected shape \[3, 5\]"):
        op(torch.randn(3, 5), torch.randn(5))
    with pytest.raises(ValueError, match=rf"^{norm}: weight is float32 \[4\] on cpu, expected shape \[5\]"):
        op(torch.randn(3, 5), torch.randn(3, 5), torch.randn(4))
