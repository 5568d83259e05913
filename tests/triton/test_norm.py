"""The Triton norms: every width and dtype, both directions, and faults planted in their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_close_to_reference
from torch import Tensor
from triton_mutants import mutant

from fastlm import ops
from fastlm.reference import layer_norm as layer_norm_reference
from fastlm.reference import rms_norm as rms_norm_reference

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import norm as kernel

Norm = Callable[..., Any]
FORMULAS: dict[str, Norm] = {
    "rms_norm": rms_norm_reference.rms_norm,
    "layer_norm": layer_norm_reference.layer_norm,
    "add_rms_norm": rms_norm_reference.add_rms_norm,
    "add_layer_norm": layer_norm_reference.add_layer_norm,
}


def _case(
    device: str, norm: str, rows: tuple[int, ...], dim: int, dtype: torch.dtype, weights: torch.dtype | None
) -> list[Tensor | None]:
    """Input (and residual), weight (and bias), all of which want gradients. Weights None: without any."""
    # In steps of 1/8, so that every dtype holds the sum: what is judged is the norm.
    eighths = [torch.randn(*rows, dim).mul(8).round().div(8) for _ in range(1 + norm.startswith("add"))]
    inputs = [(x + 0.5).to(device, dtype) for x in eighths]
    parameters = [None if w is None else torch.randn(dim, device=device).to(w) for w in (weights,) * len(_none(norm))]
    return [t if t is None else t.requires_grad_() for t in (*inputs, *parameters)]


def compare(run: Norm, norm: str, tensors: list[Tensor | None], eps: float) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    wide = [t if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    exact, got = _tuple(FORMULAS[norm](*wide, eps)), _tuple(run(*tensors, eps))
    x = tensors[0]
    assert x is not None
    upstream = [torch.randn(x.shape).to(x.dtype) for _ in exact]
    wanted = [t for t in tensors if t is not None]
    found = torch.autograd.grad(got, wanted, [u.to(x.device) for u in upstream])
    slopes = torch.autograd.grad(exact, [t for t in wide if t is not None], [u.double() for u in upstream])
    for fast, ref in zip((*got, *found), (*exact, *slopes), strict=True):
        narrow = fast.dtype if fast.dtype is not torch.float32 else x.dtype
        assert_close_to_reference(fast.detach().cpu(), ref.detach().to(narrow), ref.detach(), floor=3e-6)


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _triton(norm: str) -> Norm:
    def run(*tensors: Any) -> Any:
        with ops.backend("triton"):
            return getattr(ops, norm)(*tensors[:-1], eps=tensors[-1])

    return run


CASES = pairwise(
    norm=list(FORMULAS),
    rows=[(), (1,), (3, 5), (50,)],
    dim=[1, 16, 33, 600],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    weights=["same", "float32", "none"],
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_pair_of_options(device: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PARTS", 7)
    weights = {"same": case["dtype"], "float32": torch.float32, "none": None}[case["weights"]]
    tensors = _case(device, case["norm"], case["rows"], case["dim"], case["dtype"], weights)
    compare(_triton(case["norm"]), case["norm"], tensors, 1e-2)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_strides_large_values_and_no_rows(device: str, norm: str) -> None:
    x = torch.randn(3, 40, 8, device=device).mT  # not contiguous
    compare(_triton(norm), norm, [x.requires_grad_(), *_none(norm)], 1e-5)
    large = (torch.randn(3, 64, device=device) * 1e4).half()  # the mean square does not fit float16
    exact = FORMULAS[norm](large.float(), *_none(norm), 1e-5)
    torch.testing.assert_close(_triton(norm)(large, 1e-5).float(), exact, rtol=2e-3, atol=2e-3)
    assert _triton(norm)(torch.randn(0, 8, device=device), 1e-5).shape == (0, 8)


def _none(norm: str) -> list[None]:
    return [None] if norm.endswith("rms_norm") else [None, None]


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_sum_is_normalised_to_the_bit_as_by_itself(device: str, norm: str) -> None:
    branch, stream = torch.randn(5, 40, device=device).bfloat16(), torch.randn(40, 5, device=device).mT
    for a, b in ((branch, stream), (branch, stream.bfloat16()), (branch.mT.contiguous().mT, branch)):
        output, total = _triton(f"add_{norm}")(a, b, *_none(norm), 1e-5)
        assert torch.equal(total, a + b) and total.dtype is (a + b).dtype
        assert torch.equal(output, _triton(norm)(total, *_none(norm), 1e-5))


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_either_result_alone_has_a_gradient(device: str, norm: str) -> None:
    branch, stream = torch.randn(5, 40, device=device).bfloat16(), torch.randn(5, 40, device=device)
    upstream = torch.randn(5, 40, device=device)
    leaves = [branch.requires_grad_(), stream.requires_grad_()]
    output, total = _triton(f"add_{norm}")(*leaves, *_none(norm), 1e-5)
    for one in torch.autograd.grad(total, leaves, upstream, retain_graph=True):
        assert torch.equal(one, upstream.to(one.dtype))
    alone = total.detach().requires_grad_()
    wanted = torch.autograd.grad(_triton(norm)(alone, *_none(norm), 1e-5), alone, upstream)[0]
    for one in torch.autograd.grad(output, leaves, upstream):
        assert torch.equal(one, wanted.to(one.dtype))


FAULTS = {
    "nothing": ("", ""),
    "eps outside the root": ("/ DIM + eps)", "/ DIM) + eps"),
    "padding in the mean": ("tl.where(inside, x - mean, 0.0)", "x - mean"),
    "sum for mean": ("tl.sum(x * x, 0) / DIM", "tl.sum(x * x, 0)"),
    "weight left out": ("y = y * tl.load", "y = y + 0 * tl.load"),
    "gradient without the weight": ("dy = dy * w", "dy = dy * 1.0"),
    "gradient of the root left out": ("dx = dy - x * (tl.sum(dy * x, 0) / DIM)", "dx = dy"),
    "gradient of the mean left out": ("dx = dx - tl.sum(dy, 0) / DIM", "dx = dx * 1.0"),
    "rows dropped": ("tl.range(part, rows, tl.num_programs(0))", "tl.range(part, rows - 1, tl.num_programs(0))"),
    "parts dropped": ("sums[0].sum(0)", "sums[0][:-1].sum(0)"),
    "residual left out": ("x += tl.load(residual", "x += 0 * tl.load(residual"),
    "gradient of the sum left out": ("dx += tl.load(grad_total", "dx += 0 * tl.load(grad_total"),
    "gradient of the sum scaled": ("dx = dx * rstd\n        if", "if"),
    "gradient of the input alone": ("grad_input if want_residual else None", "0 * grad_input"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault], ("PARTS = 256", "PARTS = 4"))
    tensors = _case(device, "add_layer_norm", (9,), 40, torch.float32, torch.float32)
    if fault == "nothing":
        compare(copy.add_layer_norm, "add_layer_norm", tensors, 0.1)
    else:
        with pytest.raises(AssertionError):
            compare(copy.add_layer_norm, "add_layer_norm", tensors, 0.1)


def test_what_the_kernel_leaves_to_others(device: str) -> None:
    with ops.backend("triton"):
        reasons = [
            dict(ops.explain("rms_norm", x).reasons)["triton"] or ""
            for x in (torch.randn(2, 8, device=device).double(), torch.randn(1, 8193, device=device))
        ]
    assert "float64" in reasons[0]
    assert "8193 features" in reasons[1]
