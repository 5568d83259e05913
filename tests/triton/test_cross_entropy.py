"""The loss with Triton's softmax: every two options together, gradients, and faults planted in its source."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn import functional
from triton_mutants import mutant

from fastlm import ops
from fastlm.ops.registry import backend

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import cross_entropy as kernel

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 64)


def _case(
    device: str, tokens: int, vocabulary: int, dtype: torch.dtype, bias: bool, ignored: str, ignore_index: int
) -> tuple[list[Tensor | None], Tensor]:
    """hidden, weight and bias that want gradients; targets of which none, some or all are to be ignored."""
    shapes = ((tokens, 8), (vocabulary, 8), (vocabulary,))
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    target = torch.randint(vocabulary, (tokens,), device=device)
    if ignored != "none":
        target[:: 3 if ignored == "some" else 1] = ignore_index
    return [*tensors[:2], tensors[2] if bias else None], target


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)


def compare(loss: Loss, tensors: list[Tensor | None], target: Tensor, chunk: int = 7, **options: Any) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    hidden, weight, bias = tensors
    assert hidden is not None
    wide = [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    exact = _plain(wide[0], wide[1], target.cpu(), wide[2], **options)
    peer = _plain(hidden, weight, target, bias, **options)
    got = loss(hidden, weight, target, bias=bias, chunk_size=chunk, **options)
    upstream = torch.randn(exact.shape)
    pairs = [
        torch.autograd.grad(out, [t for t in leaves if t is not None], upstream.to(out.device, out.dtype))
        for out, leaves in ((got, tensors), (peer, tensors), (exact, wide))
    ]
    # A narrow gradient of the head is summed over chunks, each rounded: torch rounds once.
    floor = 2e-6 if hidden.dtype is torch.float32 else 2 * torch.finfo(hidden.dtype).eps
    for fast, same, ref in zip((got, *pairs[0]), (peer, *pairs[1]), (exact, *pairs[2]), strict=True):
        assert_close_to_reference(fast.detach().cpu(), same.detach().cpu(), ref.detach(), floor=floor)


def _triton(*args: Any, **options: Any) -> Tensor:
    with backend("triton"):
        return ops.cross_entropy(*args, **options)


CASES = pairwise(
    tokens=[1, 20],
    vocabulary=[1, 50, 64, 130],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    bias=[False, True],
    ignored=["none", "some"],
    ignore_index=[-100, 0],
    reduction=["none", "mean", "sum"],
    label_smoothing=[0.0, 0.2, 1.0],
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_pair_of_options(device: str, case: dict[str, Any]) -> None:
    options = {name: case.pop(name) for name in ("reduction", "label_smoothing")}
    if (case["ignore_index"] == 0 and case["vocabulary"] == 1) or case["tokens"] == 1:
        case["ignored"] = "none"  # a mean over no token is not a number
    tensors, target = _case(device, **case)
    if case["ignore_index"] == 0 and case["ignored"] == "none":
        options["ignore_index"] = -100
    compare(_triton, tensors, target, **{"ignore_index": case["ignore_index"], **options})


def test_nothing_counts(device: str) -> None:
    tensors, target = _case(device, 5, 9, torch.float32, True, "all", -100)
    assert _triton(tensors[0], tensors[1], target).isnan()
    compare(_triton, tensors, target, reduction="sum")
    assert _triton(tensors[0][:0], tensors[1], target[:0], reduction="none").shape == (0,)


def test_ignored_tokens_leave_no_trace(device: str) -> None:
    tensors, target = _case(device, 6, 20, torch.float32, True, "some", -100)
    hidden, weight, bias = tensors
    kept = target != -100
    with torch.no_grad():
        hidden[~kept] = torch.nan
    loss = _triton(hidden, weight, target, bias=bias, reduction="sum")
    expected = _plain(hidden[kept], weight, target[kept], bias, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, bias)
    (want,) = torch.autograd.grad(expected, bias)
    torch.testing.assert_close(got, want)


def test_large_logits(device: str) -> None:
    tensors, target = _case(device, 6, 70, torch.float32, False, "none", -100)
    with torch.no_grad():
        tensors[0].mul_(1e4)
    compare(_triton, tensors, target)


FAULTS = {
    "nothing": ("", ""),
    "sum not rescaled": ("total * tl.exp(top - base) +", "total +"),
    "smoothing forgotten": ("expected += smoothing *", "expected += 0 *"),
    "smoothing's mean over the padding": ("tl.sum(plain, 0) / vocabulary", "tl.sum(plain, 0) / padded"),
    "gradient of smoothing": ("slope -= factor * smoothing / vocabulary", "slope -= 0.0"),
    "target not taken off": ("factor * (1.0 - smoothing), 0.0)", "0.0, 0.0)"),
    "bias forgotten": ("if BIAS:", "if BIAS and False:"),
    "tail dropped": ("inside = start + column < vocabulary", "inside = start + column < vocabulary // BLOCK * BLOCK"),
    "padding counted": ("inside = start + column < vocabulary", "inside = start + column < padded"),
    "factor forgotten": ("each = factor / total", "each = 1.0 / total"),
    "ignored tokens counted": ("tl.where(kept, tl.log(total) - expected, 0.0)", "tl.log(total) - expected"),
    "losses of other rows": ("tl.load(targets + row)", "tl.load(targets)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault])
    monkeypatch.setattr(copy, "BLOCK", 64)
    monkeypatch.setattr(import_module("fastlm.ops.cross_entropy"), "_TRITON", copy.softmax_loss)
    tensors, target = _case(device, 10, 150, torch.float32, True, "some", -100)

    def check() -> None:
        compare(_triton, tensors, target, reduction="none", label_smoothing=0.2)

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()
