"""The Triton activations, forward and backward, and faults planted in their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import Tensor
from triton_mutants import mutant

from fastlm import ops
from fastlm.reference import activation as reference

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import activation as kernel

FORMULAS = {"gelu": reference.gelu, "swiglu": reference.swiglu}


def compare(run: Callable[..., Tensor], name: str, tensors: list[Tensor]) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    exact = FORMULAS[name](*wide)
    upstream = torch.randn(exact.shape).to(tensors[0].dtype)
    got = run(*tensors)
    found = torch.autograd.grad(got, tensors, upstream.to(got.device))
    slopes = torch.autograd.grad(exact, wide, upstream.double())
    for fast, ref in zip((got, *found), (exact, *slopes), strict=True):
        assert_close_to_reference(fast.detach().cpu(), ref.detach().to(fast.dtype), ref.detach(), floor=2e-6)


def _triton(name: str) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        with ops.backend("triton"):
            return getattr(ops, name)(*tensors)

    return run


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_layout(device: str, name: str, dtype: torch.dtype) -> None:
    count = 1 if name == "gelu" else 2
    wide = (torch.randn(3, 5, 2 * 40, device=device) * 3).to(dtype)
    for layout in (
        wide.chunk(2, dim=-1),  # both halves of one projection
        [wide[..., :40].contiguous(), wide[..., 40:].mT.contiguous().mT],
        [wide[0, 0, 0], wide[0, 0, 1]],
        [wide[:, :0], wide[:, :0]],
        [torch.randn(2500, device=device).to(dtype)] * 2,
    ):
        compare(_triton(name), name, [t.detach().clone(memory_format=torch.preserve_format) for t in layout[:count]])
    compare(_triton(name), name, list(wide.chunk(2, dim=-1))[:count])


@pytest.mark.parametrize("name", FORMULAS)
def test_far_out(device: str, name: str) -> None:
    x = torch.tensor([-3e4, -100.0, -10.0, 0.0, 10.0, 100.0, 3e4], device=device)
    compare(_triton(name), name, [x] if name == "gelu" else [x, torch.ones_like(x)])


FAULTS = {
    "nothing": ("", ""),
    "no cube": ("(g + 0.044715 * g * g * g)", "g"),
    "half the argument": ("1.5957691216057308", "0.7978845608028654"),
    "up left out": ("result = g * tl.sigmoid(g) *", "result = g * tl.sigmoid(g) + 0 *"),
    "slope of the sigmoid left out": ("slope = v * s * (1.0 + g * (1.0 - s))", "slope = v * s"),
    "slope of the cube left out": ("(1.0 + 3 * 0.044715 * g * g)", "1.0"),
    "gradient of up": ("(dy * g * s).to(grad_up", "(dy * s).to(grad_up"),
    "tail dropped": ("inside = column < columns", "inside = column < columns // BLOCK * BLOCK"),
    "rows of the wrong stride": ("row * stride_up", "row * stride_gate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault], ("BLOCK = 1024", "BLOCK = 32"))

    def check() -> None:
        compare(copy.gelu, "gelu", [torch.randn(3, 40, device=device)])
        compare(copy.swiglu, "swiglu", [torch.randn(3, 80, device=device)[:, :40], torch.randn(3, 40, device=device)])

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()
