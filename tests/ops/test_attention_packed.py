"""packed_attention: what attention gives for the split projection, with the gradients where they belong."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native

needs_native = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


def run(packed: Tensor, upstream: Tensor, heads: int, kv_heads: int, window: int | None) -> tuple[Tensor, Tensor]:
    leaf = packed.detach().requires_grad_()
    y = ops.packed_attention(leaf, num_heads=heads, num_kv_heads=kv_heads, causal=True, window=window)
    return y.detach(), torch.autograd.grad(y, leaf, upstream)[0]


def compare(found: tuple[Tensor, Tensor], packed: Tensor, upstream: Tensor, *options: int | None) -> None:
    """Output and gradient against the reference in float64; the bound is torch's error in the input's dtype."""
    with ops.backend("torch"):
        same = run(packed, upstream, *options)  # type: ignore[arg-type]
    with ops.backend("reference"):
        exact = run(packed.double(), upstream.double(), *options)  # type: ignore[arg-type]
    for a, b, c in zip(found, same, exact, strict=True):
        assert a.dtype is packed.dtype
        assert_close_to_reference(a, b, c, floor=2e-6)


@needs_native
@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([1, 8, 16, 20, 32, 64]),
    window=st.none() | st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    direct=st.booleans(),
)
def test_agrees_with_the_reference(
    batch: int, tokens: int, kv_heads: int, group: int, dim: int, window: int | None, dtype: torch.dtype, direct: bool
) -> None:
    heads, module = kv_heads * group, sys.modules["fastlm.ops.attention_packed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BFLOAT_HEADS", 1 if direct else 100)
        check(batch, tokens, kv_heads, heads, dim, window, dtype)


def check(batch: int, tokens: int, kv_heads: int, heads: int, dim: int, window: int | None, dtype: torch.dtype) -> None:
    packed = torch.randn(batch, tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    upstream = torch.randn(batch, tokens, heads * dim).to(dtype)
    compare(run(packed, upstream, heads, kv_heads, window), packed, upstream, heads, kv_heads, window)


@needs_native
@pytest.mark.parametrize("batch", [2, 9])
def test_bfloat16_heads_depend_on_themselves_alone(batch: int, isa: str) -> None:
    packed, upstream = torch.randn(batch, 110, 16 * 24).bfloat16(), torch.randn(batch, 110, 8 * 24).bfloat16()
    threads = torch.get_num_threads()
    y, grad = run(packed, upstream, 8, 4, None)
    if batch == 9:  # 36 heads; four more or fewer do not matter
        part = run(packed[2:7], upstream[2:7], 8, 4, None)
        assert torch.equal(part[0], y[2:7]) and torch.equal(part[1], grad[2:7])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = run(packed, upstream, 8, 4, None)
            assert torch.equal(again[0], y) and torch.equal(again[1], grad)
    finally:
        torch.set_num_threads(threads)


class Turned:
    """Normalised and rotated queries and keys, as a model's attention has them."""

    def __init__(self, tokens: int, dim: int, *, norms: bool, rotary: bool, interleaved: bool) -> None:
        self.weights = [torch.randn(dim) + 1 for _ in range(2 * norms)]
        angles = torch.arange(tokens)[:, None] * 0.3 / torch.arange(1, dim // 4 + 1)
        self.rotary = (angles.cos(), angles.sin(), interleaved) if rotary else None

    def run(self, packed: Tensor, upstream: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The output, and the gradients of the projection and of the norms' weights."""
        leaves = [packed.detach().requires_grad_(), *(w.to(dtype).requires_grad_() for w in self.weights)]
        tables = None if self.rotary is None else (*(t.to(dtype) for t in self.rotary[:2]), self.rotary[2])
        y = ops.packed_attention(
            leaves[0],
            num_heads=4,
            num_kv_heads=2,
            causal=True,
            norms=tuple(leaves[1:]) or None,  # type: ignore[arg-type]
            norm_eps=0.1,
            rotary=tables,
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    def compare(self, found: list[Tensor], packed: Tensor, upstream: Tensor) -> None:
        with ops.backend("torch"):
            same = self.run(packed.float(), upstream.float())
        with ops.backend("reference"):
            exact = self.run(packed.double(), upstream.double(), torch.float64)
        for a, b, c in zip(found, same, exact, strict=True):
            # bfloat16 in, bfloat16 out, floats between: results are those of floats, rounded.
            assert_close_to_reference(a, b.to(a.dtype), c, floor=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("norms", "rotary", "interleaved"), [(True, False, False), (False, True, True), (True, True, False)]
)
def test_normalised_and_rotated(dtype: torch.dtype, norms: bool, rotary: bool, interleaved: bool, isa: str) -> None:
    case = Turned(37, 16, norms=norms, rotary=rotary, interleaved=interleaved)
    packed, upstream = torch.randn(2, 37, 8 * 16).to(dtype), torch.randn(2, 37, 4 * 16).to(dtype)
    case.compare(case.run(packed, upstream), packed, upstream)


@needs_native
@pytest.mark.parametrize("fault", ["not normalised", "not rotated", "turned the other way"])
def test_planted_faults_in_what_comes_before_are_found(fault: str) -> None:
    case = Turned(37, 16, norms=True, rotary=True, interleaved=False)
    packed, upstream = torch.randn(2, 37, 8 * 16), torch.randn(2, 37, 4 * 16)
    wrong = copy.copy(case)
    assert case.rotary is not None
    cos, sin, _ = case.rotary
    if fault == "not normalised":
        wrong.weights = [w.roll(1) for w in case.weights]
    else:
        wrong.rotary = None if fault == "not rotated" else (cos, -sin * torch.linspace(1, 2, 4), False)
    case.compare(case.run(packed, upstream), packed, upstream)
    with pytest.raises(AssertionError):
        case.compare(wrong.run(packed, upstream), packed, upstream)


@needs_native
@pytest.mark.parametrize("fault", ["keys for values", "query's gradient left out", "heads in another order"])
def test_planted_faults_are_found(fault: str) -> None:
    packed, upstream = torch.randn(2, 20, 3 * 64), torch.randn(2, 20, 64)
    y, grad = run(packed, upstream, 4, 4, None)
    compare((y, grad), packed, upstream, 4, 4, None)
    q, k, v = grad.split(64, dim=-1)
    wrong = {
        "keys for values": torch.cat((q, v, k), -1),
        "query's gradient left out": torch.cat((torch.zeros_like(q), k, v), -1),
        "heads in another order": grad.unflatten(-1, (12, 16)).roll(1, 2).flatten(2),
    }[fault]
    with pytest.raises(AssertionError):
        compare((y, wrong), packed, upstream, 4, 4, None)


def test_other_ways_give_the_same() -> None:
    packed = torch.randn(2, 9, 3 * 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.packed_attention(x, num_heads=2, num_kv_heads=2, causal=True), packed)
    x = packed.detach().float()
    plain = ops.packed_attention(x, num_heads=2, num_kv_heads=2, causal=True)
    traced = torch.compile(ops.packed_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x, num_heads=2, num_kv_heads=2, causal=True), plain)
    assert ops.packed_attention(x.requires_grad_(), num_heads=2, num_kv_heads=2, dropout_p=0.5).shape == (2, 9, 32)


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 3, 40)
    with pytest.raises(ValueError, match=r"packed_attention: num_kv_heads is 2, expected a divisor of 3"):
        ops.packed_attention(x, num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"packed_attention: packed is float32 \[2, 3, 40\] on cpu, expected .* 6 D"):
        ops.packed_attention(x, num_heads=2, num_kv_heads=2)
    with pytest.raises(ValueError, match="window is 0"):
        ops.packed_attention(torch.randn(2, 3, 36), num_heads=2, num_kv_heads=2, window=0)
