"""The Triton append to a key-value cache: the reference's very bytes, in its places alone, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from triton_mutants import mutant

from fastlm import ops
from fastlm.reference import kv_cache as reference
from fastlm.reference.kv_cache import kv_width

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import kv_append as kernel

FLOAT8 = torch.float8_e4m3fn
ROWS, CAPACITY = 4, 9


def _triton(*args: Any) -> None:
    with ops.backend("triton"):
        ops.kv_append(*args[:5], rows=args[5])


def compare(run: Callable[..., None], device: str, **case: Any) -> None:
    """The comparison of this suite, which every planted fault must turn red: all of both caches."""
    dtype, cache = case["kinds"]
    batch, heads, tokens, dim = 3, case["heads"], case["tokens"], case["dim"]
    new = (torch.randn(2, batch, tokens, heads, dim) * torch.rand(2, batch, tokens, heads, 1) * 3).to(dtype)
    if cache is torch.int8:
        new[0, 0, 0, 0] = 1e-32  # counts as 0
        new[0, 1, -1, -1, 0], new[1, 2, 0, 0, -1] = torch.nan, -torch.inf
        new[1, 0, 0, 0] = torch.arange(dim) - dim + 0.5  # ties, had the scale been 1
        new[1, 0, 0, 0, 0] = 127.0
    elif cache is FLOAT8:
        new[:, 0, 0, 0, 0], new[:, 1, 0, 0, 0] = -1e4, torch.nan
    key, value = new.to(device).transpose(2, 3) if case["turned"] else new.to(device).transpose(2, 3).contiguous()
    starts = torch.tensor([CAPACITY - tokens, 0, 2], device=device)
    rows = torch.tensor([2, 0, 3], device=device) if case["rows"] else None
    width = kv_width(dim, cache or dtype)
    before = torch.randint(-100, 100, (2, ROWS, heads, CAPACITY, width)).to(cache or dtype)
    expected, found = before.clone(), before.to(device)
    reference.kv_append(*expected, *new.transpose(2, 3), starts.cpu(), None if rows is None else rows.cpu())
    run(*found, key, value, starts, rows)
    if cache is FLOAT8:  # which of its two NaN does not matter
        found, expected = (t.cpu().float().nan_to_num(1e6) for t in (found, expected))
    assert torch.equal(*(t.cpu().view(torch.uint8) for t in (found, expected)))


CASES = pairwise(
    kinds=[
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.float16, torch.int8),
        (torch.float32, FLOAT8),
        (torch.bfloat16, FLOAT8),
    ],
    heads=[1, 3],
    tokens=[1, 4],
    dim=[4, 20, 512],
    rows=[False, True],
    turned=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_pair_of_options(device: str, case: dict[str, Any]) -> None:
    compare(_triton, device, **case)


def test_nothing_is_written_outside_of_the_cache(device: str) -> None:
    whole = torch.zeros(2, 6, 2, 5, 8, device=device)
    keys, values = whole[:, 1:5]  # rows before and behind are others' memory
    new = torch.ones(4, 2, 2, 8, device=device)
    starts, rows = torch.tensor([4, -1, 0, 0], device=device), torch.tensor([0, 1, 4, -1], device=device)
    kernel.kv_append(keys, values, new, new, starts, rows)
    assert whole.sum().item() == 2 * 2 * 2 * 8  # one token each of the first two, keys and values, two heads
    assert keys[0, :, 4].all() and keys[1, :, 0].all()


FAULTS = {
    "nothing": ("", ""),
    "scale of another head": ("tl.store(scales + target,", "tl.store(scales + (target - target % 12),"),
    "a scale for all heads": (
        "largest = tl.max(tl.abs(x), 1)",
        "largest = tl.max(tl.abs(x), 1) * 0 + tl.max(tl.abs(x))",
    ),
    "scaled to 128": ("largest.shape, 127.0", "largest.shape, 128.0"),
    "cut, not rounded": ("+ 12582912.0", "- 0.5 + 12582912.0"),
    "NaN lost": ('tl.where(wild, float("nan"),', "tl.where(wild, 1.0,"),
    "nothing is small": ("tiny = largest < 1e-30", "tiny = largest < -1.0"),
    "the next position": ("tl.load(starts + batch) + token", "tl.load(starts + batch) + token + 1"),
    "tokens in one place": ("tl.load(starts + batch) + token", "tl.load(starts + batch) + 0 * token"),
    "rows ignored": ("row = tl.load(rows + batch)", "row = batch + 0 * tl.load(rows + batch)"),
    "one head": ("head * stride_kh + token", "head * 0 + token"),
    "values of another sequence": ("batch * stride_vb", "0 * stride_vb"),
    "the last head dropped": ("tl.where(fits, heads, 0)", "tl.where(fits, heads - 1, 0)"),
    "the last feature dropped": ("(feature < DIM)", "(feature < DIM - 1)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault])

    def check() -> None:
        for kinds in ((torch.float32, torch.int8), (torch.float32, FLOAT8)):
            compare(copy.kv_append, device, kinds=kinds, heads=3, tokens=2, dim=12, rows=True, turned=True)

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()


def test_what_the_kernel_leaves_to_others(device: str) -> None:
    def reason(dtype: torch.dtype, dim: int, new: torch.dtype = torch.float32) -> str:
        cache = torch.zeros(2, 1, 4, kv_width(dim, dtype), dtype=dtype, device=device)
        key = torch.zeros(2, 1, 1, dim, dtype=new, device=device)
        with ops.backend("triton"):
            starts = torch.zeros(2, dtype=torch.int64, device=device)
            reasons: list[tuple[str, str | None]] = ops.explain(
                "kv_append", cache, cache.clone(), key, key, starts
            ).reasons
            return dict(reasons)["triton"] or ""

    assert "multiples of 4 bytes" in reason(torch.int8, 6)
    assert "float32, float16 and bfloat16" in reason(torch.float64, 8, torch.float64)
    assert reason(torch.int8, 8) == ""


def test_a_gradient_is_refused(device: str) -> None:
    caches, new = torch.zeros(2, 1, 1, 3, 4, device=device), torch.zeros(1, 1, 1, 4, device=device)
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    with ops.backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
        ops.kv_append(*caches, new.requires_grad_(), new, starts)
