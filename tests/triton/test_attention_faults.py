"""Tests of the tests: kernels with a fault planted in their source must turn the suite's comparison red."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_attention import Case, build, by_kernel, compare
from triton_mutants import mutant

from fastlm.kernels.triton import attention, attention_bwd, attention_fwd
from fastlm.ops import attention_kernels

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "blind": {"causal": True, "lengths": (51, 37)},
    "window": {"causal": True, "window": 40, "lengths": (70, 70)},
    "soft": {"softcap": 1.0, "alibi": 2},
    "dropout": {"dropout_p": 0.3},
    "sinks": {"sinks": True, "mask": "bool"},
    "few": {"causal": True, "lengths": (3, 65)},
    "packed": {"causal": True, "layout": "packed", "alibi": 2},
    "top left": {"causal": True, "top_left": True},
    "additive": {"mask": "additive", "layout": "strided"},
    "bfloat16": {"dtype": torch.bfloat16},
}

# The call that finds it, the file, what it says, what it is made to say. "common, gradients": of what both passes
# share, in the backward alone; "": in the launcher.
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "a key too many": ("causal", "common", "seen & (j <= i + shift)", "seen & (j <= i + shift + 1)"),
    "a key too few": ("causal", "common", "seen & (j <= i + shift)", "seen & (j < i + shift)"),
    "aligned at the start": ("causal", "fwd", "0 if TOP_LEFT else keys - queries", "0"),
    "window off by one": ("window", "common", "(j > i + shift - window)", "(j >= i + shift - window)"),
    "the diagonal taken for full": (
        "causal",
        "fwd",
        "full_hi, hi = low + 1, high + 1",
        "full_hi, hi = high + 1, high + 1",
    ),
    "the window's edge taken for full": ("window", "fwd", "= low - window + 1, high - window + 1", "= 0, 0"),
    "keys beyond the end seen": (
        "plain",
        "common",
        "seen = (j < keys) & (i < queries)",
        "seen = (j >= 0) & (i < queries)",
    ),
    "the tail of the keys dropped": (
        "plain",
        "common",
        "hi = tl.minimum(tl.maximum(hi, 0), end)",
        "hi = tl.minimum(tl.maximum(hi, 0), end) // BLOCK * BLOCK",
    ),
    "the output not rescaled": ("plain", "fwd", "output * shrink[:, None]", "output"),
    "the sum not rescaled": ("plain", "fwd", "total * shrink + ", "total + "),
    "the wrong head of keys": ("plain", "fwd", "(h // GROUP) * stride_kh", "(h % (heads // GROUP)) * stride_kh"),
    "the wrong head among few queries": ("few", "fwd", "hs = h + r % together", "hs = h + r // queries % together"),
    "the wrong query among few": (
        "few",
        "fwd",
        "high = tl.minimum((first + BLOCK_M - 1) // together",
        "high = tl.minimum((first + BLOCK_M - 1) % together",
    ),
    "scale left out": ("plain", "fwd", "factor = (scale if softcap is None else softcap) * LOG2E", "factor = LOG2E"),
    "no softcap": ("soft", "common", "if softcap is not None", "if False"),
    "ALiBi grows with distance": ("soft", "common", "(j - i - shift)", "(i + shift - j)"),
    "slopes of another sequence": ("packed", "fwd", "SLOPES + b * stride_sb + hs", "SLOPES + hs"),
    "NaN where nothing is seen": ("blind", "fwd", 'zero = tl.where(top == float("-inf"), 0.0, top)', "zero = top"),
    "the mask inverted": ("sinks", "common", "tl.where(given != 0, x", "tl.where(given == 0, x"),
    "sinks left out": (
        "sinks",
        "fwd",
        'total = tl.where(peak == float("-inf"), 0.0, 1.0)',
        "total = tl.zeros((BLOCK_M,), tl.float32)",
    ),
    "log-sum-exp without its peak": ("plain", "fwd", "peak * LN2 + tl.log", "tl.log"),
    "dropout not made up for": ("dropout", "fwd", "weight = weight / (1.0 - dropout_p)", "weight = weight * 1.0"),
    "dropout by another place": ("dropout", "common", "i[:, None], h, b)", "i[:, None], b, h)"),
    "the next sequence's keys": (
        "packed",
        "common",
        "begin = tl.load(starts + b).to(tl.int64)",
        "begin = tl.load(starts + b).to(tl.int64) + 1",
    ),
    "delta left out, keys": ("plain", "bwd", "ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "delta left out, queries": ("plain", "bwd", "ds = p * (dp - delta[:, None])", "ds = p * dp"),
    "the log-sum-exp's gradient left out": ("plain", "bwd", "if DLSE is not None", "if False"),
    "keys' gradient not scaled": ("plain", "bwd", "(dk * scale)", "dk"),
    "queries' gradient not scaled": ("plain", "bwd", "(dq * scale)", "dq"),
    "one head's share of keys": ("plain", "bwd", "for g in tl.range(0, GROUP)", "for g in tl.range(0, 1)"),
    "the diagonal taken for full, keys": (
        "causal",
        "bwd",
        "lo, full_lo = first - shift, last - shift",
        "lo, full_lo = first - shift, first - shift",
    ),
    "the window's edge taken for full, keys": (
        "window",
        "bwd",
        "full_hi, hi = first + window - shift, last",
        "full_hi, hi = last + window - shift, last",
    ),
    "a query too few, keys": (
        "window",
        "bwd",
        "full_hi, hi = first + window - shift, last + window - shift",
        "full_hi, hi = first + window - shift, last - shift",
    ),
    "infinite weights where nothing is seen": (
        "blind",
        "bwd",
        'tl.where(lse == float("-inf"), float("inf"), lse)',
        "lse",
    ),
    "dropout left out of values": ("dropout", "bwd", "used = tl.where(keep, p, 0.0)", "used = p"),
    "dropout not made up for, values": ("dropout", "bwd", "dv *= 1.0 / (1.0 - dropout_p)", "dv *= 1.0"),
    "softcap's derivative, keys": ("soft", "bwd", "ds *= 1.0 - t * t\n        dk", "ds *= 1.0\n        dk"),
    "a key too many, gradients": ("causal", "common, gradients", "(j <= i + shift)", "(j <= i + shift + 1)"),
    "a key too few, gradients": ("causal", "common, gradients", "(j <= i + shift)", "(j < i + shift)"),
    "window off by one, gradients": (
        "window",
        "common, gradients",
        "(j > i + shift - window)",
        "(j >= i + shift - window)",
    ),
    "the diagonal taken for full, queries": (
        "causal",
        "bwd",
        "full_hi, hi = low + 1, high + 1",
        "full_hi, hi = high + 1, high + 1",
    ),
    "the tail dropped, keys": (
        "plain",
        "bwd",
        "split(lo, full_lo, full_hi, hi, queries, BLOCK_M)",
        "split(lo, full_lo, full_hi, hi, queries // BLOCK_M * BLOCK_M, BLOCK_M)",
    ),
    "the tail dropped, queries": (
        "plain",
        "bwd",
        "split(lo, full_lo, full_hi, hi, keys, BLOCK_N)",
        "split(lo, full_lo, full_hi, hi, keys // BLOCK_N * BLOCK_N, BLOCK_N)",
    ),
    "the wrong heads of queries, keys": ("plain", "bwd", "h = kv_head * GROUP + g", "h = kv_head + g * kv_heads"),
    "the wrong head of keys, queries": (
        "plain",
        "bwd",
        "(h // GROUP) * stride_kh",
        "(h % (heads // GROUP)) * stride_kh",
    ),
    "weights not relative to the log-sum-exp": (
        "plain",
        "bwd",
        "tl.fma(x, unit, -peak)",
        "tl.fma(x, unit, 0.0 * peak)",
    ),
    "aligned at the end": ("top left", "fwd", "0 if TOP_LEFT else keys - queries", "keys - queries"),
    "aligned at the end, gradients": ("top left", "bwd", "0 if TOP_LEFT else keys - queries", "keys - queries"),
    "aligned at the start, gradients": ("causal", "bwd", "0 if TOP_LEFT else keys - queries", "0"),
    "the added mask in other units": ("additive", "common", "given.to(tl.float32) * LOG2E", "given.to(tl.float32)"),
    "the mask of another head": ("additive", "fwd", "+ hs[:, None] * stride_mh", "+ hs[:, None] * 0"),
    "the mask of another head, gradients": ("additive", "bwd", "+ h * stride_mh", "+ h * 0"),
    "features beyond the head's": ("additive", "common", "inside = (column < D)", "inside = (column < BLOCK_D)"),
    "slopes of another head, gradients": ("soft", "bwd", "SLOPES + b * stride_sb + h", "SLOPES + b * stride_sb"),
    "dropout left out of weights' gradient, keys": (
        "dropout",
        "bwd",
        "dp = tl.where(keep, dp, 0.0) * (1.0 / (1.0 - dropout_p))\n        dv",
        "dp *= 1.0\n        dv",
    ),
    "dropout left out of weights' gradient, queries": (
        "dropout",
        "bwd",
        "dp = tl.where(keep, dp, 0.0) * (1.0 / (1.0 - dropout_p))\n        ds",
        "dp *= 1.0\n        ds",
    ),
    "sinks' gradient without its weight": ("sinks", "", "torch.exp(o.sinks.float()[:, None] - lse) * delta", "delta"),
    "queries that share keys in other places": ("few", "", "PACK=pack", "PACK=False"),
    "weights of few bits": ("bfloat16", "fwd", "p.to(v.dtype)", "p.to(tl.float8e4nv).to(v.dtype)"),
    "gradients of few bits": ("bfloat16", "bwd", "ds.to(q.dtype)", "ds.to(tl.float8e5).to(q.dtype)"),
    "softcap's derivative, queries": ("soft", "bwd", "ds *= 1.0 - t * t\n        dq", "ds *= 1.0\n        dq"),
}


@pytest.fixture(scope="module")
def sound() -> Callable[[str, str], Case]:
    """A call that the kernels as they are get right; checked once each."""
    known: dict[str, Case] = {}

    def case(name: str, device: str) -> Case:
        if name not in known:
            known[name] = build(device, batch=1, **CALLS[name])
            compare(known[name], seed=7)
        return known[name]

    return case


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    fault: str, device: str, sound: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, name, old, new = FAULTS[fault]
    case = sound(call, device)
    file, _, alone = name.partition(", ")
    module = importlib.import_module("_".join(filter(None, ("fastlm.kernels.triton.attention", file))))
    changed = mutant(module, tmp_path, (old, new))
    if not file:
        kernel = attention_kernels.Kernel(changed.attention, changed.attention_backward, True)
        monkeypatch.setattr(attention_kernels, "TRITON", kernel)
    places = [attention_bwd] if alone else [attention_fwd, attention_bwd] if file == "common" else [attention]
    for place in places:
        for symbol in changed.__all__:
            if hasattr(place, symbol):
                monkeypatch.setattr(place, symbol, getattr(changed, symbol))
    with pytest.raises(AssertionError):
        compare(case, 7, by_kernel)
