"""The Triton rotary embedding, forward and backward, and faults planted in its source."""

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
from fastlm.reference import rotary as reference

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import rotary as kernel


def _case(
    device: str, heads: int, tokens: int, dim: int, rotated: int, tables: str, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x = torch.randn(2, tokens, heads, dim).transpose(1, 2).to(device, dtype)
    shape = {"shared": (tokens,), "own": (2, tokens), "starts": (50,)}[tables]
    angles = torch.rand(*shape, rotated // 2, device=device) * 6
    starts = torch.tensor([50 - tokens, 3], device=device) if tables == "starts" else None
    return x if transposed else x.contiguous(), angles.cos(), angles.sin(), starts


def compare(run: Callable[..., Tensor], case: tuple[Tensor, Tensor, Tensor, Tensor | None], interleaved: bool) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    x, cos, sin, starts = case
    leaf = x.detach().requires_grad_()
    wide = x.detach().cpu().double().requires_grad_()
    exact = reference.rotary(
        wide, cos.cpu().double(), sin.cpu().double(), interleaved, None if starts is None else starts.cpu()
    )
    upstream = torch.randn(x.shape).to(x.dtype)
    got = run(leaf, cos, sin, interleaved=interleaved, starts=starts)
    (found,) = torch.autograd.grad(got, leaf, upstream.to(x.device))
    (slope,) = torch.autograd.grad(exact, wide, upstream.double())
    for fast, ref in ((got, exact), (found, slope)):
        assert_close_to_reference(fast.detach().cpu(), ref.detach().to(x.dtype), ref.detach())


def _triton(*args: Tensor, **options: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.rotary(*args, **options)


CASES = pairwise(
    heads=[1, 3],
    tokens=[1, 5],
    widths=[(16, 16), (20, 12), (6, 2), (33, 0)],
    tables=["shared", "own", "starts"],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    transposed=[False, True],
    interleaved=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_pair_of_options(device: str, case: dict[str, Any]) -> None:
    (dim, rotated), interleaved = case.pop("widths"), case.pop("interleaved")
    compare(_triton, _case(device, dim=dim, rotated=rotated, **case), interleaved)


def test_nothing_to_do_and_the_tables_gradient(device: str) -> None:
    x, cos, sin, _ = _case(device, 2, 3, 8, 8, "shared", torch.float32, False)
    assert _triton(x[:0], cos, sin).shape == (0, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="a gradient of the tables is wanted"):
        _triton(x, cos.requires_grad_(), sin)


FAULTS = {
    "nothing": ("", ""),
    "turned the other way": ("x * c[None, :] - y * s[None, :]", "x * c[None, :] + y * s[None, :]"),
    "backward turned the same way": ("starts, -1.0)", "starts, 1.0)"),
    "start forgotten": ("place += tl.load(starts + batch)", "place += 0"),
    "start of another sequence": ("tl.load(starts + batch)", "tl.load(starts)"),
    "rest dropped": ("if REST:", "if REST and False:"),
    "last heads dropped": ("used = head < heads", "used = head < heads - 1"),
    "position off by one": ("place * HALF", "(place + 1) % tokens * HALF"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault])

    def run(*args: Any, interleaved: bool, starts: Tensor | None) -> Tensor:
        return copy.rotary(*args, interleaved, starts)

    def check() -> None:
        compare(run, _case(device, 3, 5, 12, 8, "starts", torch.float32, False), False)

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()
