"""ops.attention: every option with every other against loops, the fast path against the formula, planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import naive_attention
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.reference import attention as reference

SHAPES = [(5, 5), (2, 6), (1, 4), (6, 3)]  # queries, keys


def _inputs(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, queries, dim, dtype=dtype),
        torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
        torch.randn(batch, kv_heads, keys, value_dim, dtype=dtype),
    )


def _mask(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "bool":
        return torch.rand(batch, 1, queries, keys) < 0.7
    bias = torch.randn(heads, 1, keys, dtype=torch.float64)
    return bias.masked_fill(torch.rand(heads, 1, keys) < 0.2, -torch.inf)


def _options(mask: str, causal: bool, window: int | None, softcap: float | None, alibi: int, *sizes: int) -> Any:
    batch, heads, queries, keys = sizes
    slopes = [None, torch.rand(heads), torch.rand(batch, heads)][alibi]
    return {
        "causal": causal,
        "mask": _mask(mask, batch, heads, queries, keys),
        "window": window,
        "softcap": softcap,
        "alibi_slopes": slopes,
        "scale": 0.7,
    }


Attend = Callable[..., Tensor]


def compare(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    torch.testing.assert_close(
        attend(query, key, value, **options),
        naive_attention(query, key, value, **options),
        rtol=1e-9,
        atol=1e-9,
        check_dtype=False,
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_every_combination_of_options(backend: str, kv_heads: int, sizes: tuple[int, int], mask: str) -> None:
    for causal, window, softcap, alibi in itertools.product([False, True], [None, 1, 3], [None, 1.5], [0, 1, 2]):
        if softcap is not None and backend == "torch":
            continue
        options = _options(mask, causal, window, softcap, alibi, 2, 4, *sizes)
        with ops.backend(backend):
            compare(ops.attention, *_inputs(2, 4, kv_heads, *sizes, 3, 5, torch.float64), **options)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_aligned_at_the_start_and_with_sinks(sizes: tuple[int, int], mask: str) -> None:
    for causal, window, alibi, top_left in itertools.product([False, True], [None, 1, 3], [0, 2], [False, True]):
        options = _options(mask, causal, window, None, alibi, 2, 4, *sizes) | {"top_left": top_left}
        tensors = _inputs(2, 4, 2, *sizes, 3, 5, torch.float64)
        with ops.backend("torch"):
            compare(ops.attention, *tensors, **options)
        with ops.backend("reference"):
            compare(ops.attention, *tensors, **options, sinks=torch.randn(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_merge_by_their_log_sum_exp(dtype: torch.dtype, sinks: bool) -> None:
    """Attention to some keys and to the others, merged, is attention to all; a sink counts with one of them."""
    query, key, value = _inputs(2, 4, 2, 3, 9, 4, 5, dtype)
    sink = {"sinks": torch.randn(4)} if sinks else {}
    first, l1 = ops.attention_lse(query, key[:, :, :5], value[:, :, :5], **sink)
    second, l2 = ops.attention_lse(query, key[:, :, 5:], value[:, :, 5:])
    whole, both = ops.attention_lse(query, key, value, **sink)
    torch.testing.assert_close(torch.logaddexp(l1, l2), both)
    torch.testing.assert_close((l1 - both).exp()[..., None] * first + (l2 - both).exp()[..., None] * second, whole)
    torch.testing.assert_close(ops.attention(query, key, value, **sink), whole)
    nothing = ops.attention_lse(query, key, value, mask=torch.zeros(3, 9) > 0)
    assert (nothing[0] == 0).all() and (nothing[1] == -torch.inf).all()


def test_gradients_of_sinks_and_log_sum_exp() -> None:
    tensors = [t.requires_grad_() for t in _inputs(1, 4, 2, 4, 3, 3, 2, torch.float64)]  # a blind query where causal
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: ops.attention_lse(q, k, v, causal=True, sinks=s), (*tensors, sinks)
    )

    def seen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = ops.attention_lse(q, k, v, causal=True)
        return output, lse[:, :, 1:]

    assert torch.autograd.gradcheck(seen, tensors)


FAULTS: dict[str, Attend] = {
    "zeros": lambda q, k, v, **o: torch.zeros_like(ops.attention(q, k, v, **o)),
    "causal off by one": lambda q, k, v, **o: ops.attention(
        q,
        k,
        v,
        **{**o, "causal": False, "mask": torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2] + 1) > 0},
    ),
    "causal aligned to the top left": lambda q, k, v, **o: ops.attention(
        q, k, v, **{**o, "causal": False, "mask": torch.ones(q.shape[2], k.shape[2]).tril() > 0}
    ),
    "window off by one": lambda q, k, v, **o: ops.attention(q, k, v, **{**o, "window": o["window"] + 1}),
    "query heads dealt out to key heads in turn": lambda q, k, v, **o: ops.attention(
        q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), **o
    ),
    "ALiBi grows with distance": lambda q, k, v, **o: ops.attention(
        q, k, v, **{**o, "alibi_slopes": -o["alibi_slopes"]}
    ),
    "no softcap": lambda q, k, v, **o: ops.attention(q, k, v, **{**o, "softcap": None}),
    "scale left out": lambda q, k, v, **o: ops.attention(q, k, v, **{**o, "scale": 1.0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    tensors = _inputs(2, 4, 2, 3, 6, 3, 5, torch.float64)
    options = _options("none", True, 2, 1.5, 1, 2, 4, 3, 6)
    compare(ops.attention, *tensors, **options)
    with pytest.raises(AssertionError):
        compare(FAULTS[fault], *tensors, **options)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_torch_agrees_with_the_formula_on_any_shape_and_stride(data: st.DataObject) -> None:
    batch, kv_heads, group, dim = (data.draw(st.integers(1, 3)) for _ in range(4))
    queries, keys = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    heads = kv_heads * group
    torch.manual_seed(data.draw(st.integers(0, 99)))
    # [B, T, H, D] seen as [B, H, T, D]: what a projection leaves
    query = torch.randn(batch, queries, heads, dim * 8).transpose(1, 2)
    key, value = torch.randn(2, batch, keys, kv_heads, dim * 8).transpose(2, 3)
    options = _options(
        data.draw(st.sampled_from(["none", "bool", "additive"])),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([None, 1, 16, 200])),
        None,
        data.draw(st.integers(0, 2)),
        *(batch, heads, queries, keys),
    )
    with ops.backend("torch"):
        fast = ops.attention(query, key, value, **options)
    with ops.backend("reference"):
        exact = ops.attention(query.double(), key.double(), value.double(), **options)
        single = ops.attention(query, key, value, **options)
    assert_close_to_reference(fast, single, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_torch(dtype: torch.dtype) -> None:
    query, key, value = _inputs(2, 4, 2, 40, 60, 16, 16, dtype)
    options = _options("none", True, 30, None, 1, 2, 4, 40, 60)
    exact = reference.attention(query.double(), key.double(), value.double(), **options, dropout_p=0.0)
    rounded = exact.to(dtype)  # no implementation that returns this dtype can do better
    assert_close_to_reference(ops.attention(query, key, value, **options), rounded, exact, floor=1e-2)
    with ops.backend("reference"):
        assert_close_to_reference(ops.attention(query, key, value, **options), rounded, exact, floor=1e-3)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_agree(mask: str, causal: bool) -> None:
    tensors = [t.requires_grad_() for t in _inputs(2, 4, 2, 5, 3, 4, 4, torch.float64)]  # blind queries where causal
    options = _options(mask, causal, 2, None, 2, 2, 4, 5, 3)
    options["alibi_slopes"].requires_grad_()
    wanted = [*tensors, options["alibi_slopes"]]
    if mask == "additive":
        options["mask"] = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
        wanted.append(options["mask"])
    upstream = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            found.append(torch.autograd.grad(ops.attention(*tensors, **options), wanted, upstream))
    for fast, slow in zip(*found, strict=True):
        assert slow.isfinite().all()
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-8)  # float32 slopes


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_drops_its_share_and_keeps_the_mean(backend: str) -> None:
    keys, p = 64, 0.25
    query, key = torch.zeros(2, 3, 50, 4), torch.randn(2, 3, keys, 4)
    value = torch.eye(keys).expand(2, 3, keys, keys)  # so that the output is the weights
    with ops.backend(backend):
        torch.manual_seed(7)
        weights = ops.attention(query, key, value, dropout_p=p)
        other = ops.attention(query, key, value, dropout_p=p)
        torch.manual_seed(7)
        again = ops.attention(query, key, value, dropout_p=p)
    assert torch.equal(weights, again)
    assert not torch.equal(weights, other)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / keys / (1 - p)))
    count = weights.numel()
    assert abs(kept.sum().item() - count * (1 - p)) < 5 * (count * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 4, 8)}, r"query is float32 \[2, 4, 8\] on cpu, expected shape \[B, H, Tq, D\]"),
        ({"key": torch.randn(2, 2, 5, 7)}, r"key is .*expected shape \[2, KVH, Tk, 8\]"),
        ({"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 8)}, "key has 3 heads, expected a divisor"),
        ({"value": torch.randn(2, 2, 4, 8)}, r"value is .*expected shape \[2, 2, 5, Dv\]"),
        ({"value": torch.randn(2, 2, 5, 8).double()}, "value is float64 .*expected the query's dtype"),
        ({"mask": torch.ones(3, 4) > 0}, r"mask is bool \[3, 4\] on cpu, expected to broadcast to \[2, 4, 3, 5\]"),
        ({"mask": torch.ones(3, 5, dtype=torch.int64)}, "mask is int64 .*expected bool"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a number above 0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"alibi_slopes": torch.rand(3)}, r"alibi_slopes is .*expected shape \[4\] or \[2, 4\]"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, expected 0 <= dropout_p < 1"),
        ({"sinks": torch.rand(2)}, r"sinks is float32 \[2\] on cpu, expected shape \[4\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    query, key, value = _inputs(2, 4, 2, 3, 5, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"^attention: " + message):
        ops.attention(**{"query": query, "key": key, "value": value, **change})


def test_empty_inputs() -> None:
    assert ops.attention(*_inputs(0, 4, 2, 3, 5, 8, 8, torch.float32)).shape == (0, 4, 3, 8)
    assert ops.attention(*_inputs(2, 4, 2, 0, 5, 8, 8, torch.float32), causal=True).shape == (2, 4, 0, 8)
    assert (ops.attention(*_inputs(2, 4, 2, 3, 0, 8, 8, torch.float32)) == torch.zeros(2, 4, 3, 8)).all()


def test_torch_says_what_it_lacks() -> None:
    tensors = _inputs(1, 1, 1, 1, 1, 1, 1, torch.float64)
    assert ops.explain("attention", *tensors, softcap=1.0).chosen == "reference"
    with ops.backend("torch"), pytest.raises(NotImplementedError, match="no softcap"):
        ops.attention(*tensors, softcap=1.0)
