"""packed_attention: what attention gives for the split projection, with the gradients where they belong."""

from __future__ import annotations

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
)
def test_agrees_with_the_reference(
    batch: int, tokens: int, kv_heads: int, group: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    heads = kv_heads * group
    packed = torch.randn(batch, tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    upstream = torch.randn(batch, tokens, heads * dim).to(dtype)
    compare(run(packed, upstream, heads, kv_heads, window), packed, upstream, heads, kv_heads, window)


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
