"""The native attention against the formula in float64, and what it promises beyond: bits that depend on nothing but
the query and the keys it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import attention as kernel
from fastlm.reference import attention as reference

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))

BLOCK_ROWS, BLOCK_KEYS = 96, 192  # of the kernel: sizes on both sides of them are the ones to try


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, value_dim: int) -> list[Tensor]:
    """Views into larger tensors of NaN, laid out as a projection leaves them: [B, T, H, D] seen as [B, H, T, D]."""
    found = []
    for count, length, width in ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)):
        whole = torch.full((batch, length + 2, count, width + 3), torch.nan)
        view = whole[:, 1:-1, :, 2:-1]
        view.copy_(torch.randn(view.shape))
        found.append(view.transpose(1, 2))
    return found


def options(**given: Any) -> dict[str, Any]:
    return {
        "causal": False, "mask": None, "scale": 0.3, "window": None, "softcap": None, "alibi_slopes": None, **given
    }  # fmt: skip


def formula(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    return reference.attention(query, key, value, **options, dropout_p=0.0)


Attend = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def native_attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    with ops.backend("cpu"):
        return ops.attention(query, key, value, **options)


def compare(given: list[Tensor], options: dict[str, Any], attend: Attend = native_attention) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    query, key, value = given
    exact = formula(query.double(), key.double(), value.double(), options)
    single = formula(query, key, value, options)
    assert_close_to_reference(attend(query, key, value, options), single, exact, floor=3e-6)


def a_mask(kind: str, *shape: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.rand(shape) < 0.8
    return seen if kind == "bool" else torch.randn(shape).masked_fill(~seen, -torch.inf)


EVERY = [
    options(),
    options(causal=True),
    options(causal=True, window=1),
    options(causal=True, window=70, alibi_slopes=torch.rand(6)),
    options(window=30, softcap=2.0),
    options(causal=True, softcap=1.5, alibi_slopes=torch.rand(2, 6)),
]


@pytest.mark.parametrize("chosen", range(len(EVERY)))
@pytest.mark.parametrize("sizes", [(1, 1), (40, 300), (193, 193), (100, 60)])
def test_options_on_both_sides_of_the_blocks(isa: str, chosen: int, sizes: tuple[int, int]) -> None:
    for kv_heads, dim, value_dim in ((2, 24, 40), (6, 64, 7)):
        compare(tensors(2, 6, kv_heads, *sizes, dim, value_dim), EVERY[chosen])


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", [(2, 6, 50, 210), (2, 1, 50, 210), (1, 1, 1, 210), (6, 50, 1), (50, 210)])
def test_masks_of_every_shape(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    compare(tensors(2, 6, 3, 50, 210, 16, 16), options(mask=a_mask(kind, *shape), causal=True))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    queries, keys = data.draw(st.integers(1, 2 * BLOCK_ROWS)), data.draw(st.integers(1, 2 * BLOCK_KEYS))
    dim, value_dim = data.draw(st.integers(1, 256)), data.draw(st.integers(1, 256))
    heads = kv_heads * group
    torch.manual_seed(data.draw(st.integers(0, 99)))
    chosen = options(
        causal=data.draw(st.booleans()),
        mask=a_mask(data.draw(st.sampled_from(["none", "bool", "additive"])), batch, 1, queries, keys),
        window=data.draw(st.sampled_from([None, 1, 50, 500])),
        softcap=data.draw(st.sampled_from([None, 3.0])),
        alibi_slopes=data.draw(st.sampled_from([None, torch.rand(heads)])),
        scale=dim**-0.5,
    )
    compare(tensors(batch, heads, kv_heads, queries, keys, dim, value_dim), chosen)


def without_rescaling(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Adds up blocks of keys, each relative to its own largest score."""
    scores = options["scale"] * query @ key.repeat_interleave(2, 1).mT
    weights = torch.cat([(s - s.amax(-1, keepdim=True)).exp() for s in scores.split(BLOCK_KEYS, -1)], -1)
    return weights @ value.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True)


def visible_shifted(by: int) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys).tril(keys - queries + by) > 0
        return native_attention(query, key, value, {**options, "causal": False, "mask": mask})

    return attend


FAULTS: dict[str, tuple[Attend, dict[str, Any]]] = {
    "zeros": (lambda q, k, v, o: torch.zeros_like(formula(q, k, v, o)), {}),
    "a key too many": (visible_shifted(1), {"causal": True}),
    "a key too few": (visible_shifted(-1), {"causal": True}),
    "window off by one": (lambda q, k, v, o: native_attention(q, k, v, {**o, "window": 41}), {"window": 40}),
    "no rescaling between blocks": (without_rescaling, {}),
    "query heads dealt out to key heads in turn": (
        lambda q, k, v, o: native_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), o), {}
    ),
    "the last key dropped": (lambda q, k, v, o: native_attention(q, k[:, :, :-1], v[:, :, :-1], o), {}),
    "the last feature dropped": (lambda q, k, v, o: native_attention(q[..., :-1], k[..., :-1], v, o), {}),
    "slopes of the wrong head": (
        lambda q, k, v, o: native_attention(q, k, v, {**o, "alibi_slopes": o["alibi_slopes"].flip(0)}),
        {"alibi_slopes": torch.tensor([0.01, 0.02, 0.03, 0.04])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    attend, chosen = FAULTS[fault]
    given = tensors(2, 4, 2, 200, 400, 33, 20)
    compare(given, options(**chosen))
    with pytest.raises(AssertionError):
        compare(given, options(**chosen), attend)


def test_rows_that_see_nothing_are_zero() -> None:
    query, key, value = tensors(1, 2, 1, 6, 3, 8, 8)
    output, lse = kernel.attention(query, key, value, True, None, 0.3, None, None, None, save=True)
    assert lse is not None
    assert (output[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
    compare([query, key, value], options(causal=True))
    masked = options(mask=torch.zeros(6, 3, dtype=torch.bool))
    assert (native_attention(query, key, value, masked) == 0).all()
    # The lowest float is a bias like any other: a row that has nothing else spreads its weight evenly.
    lowest = options(mask=torch.full((6, 3), torch.finfo(torch.float32).min))
    torch.testing.assert_close(native_attention(query, key, value, lowest), value.mean(2, True).expand(1, 2, 6, 8))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    query, key, value = tensors(1, 2, 2, 30, 400, 16, 16)
    compare([query * 300, key, value], options(causal=True, scale=1.0))
    query, key = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 400, 16)
    key[:, :, 390] = 3  # every earlier block's sums must shrink to nothing
    output = native_attention(query * 100, key, value[:, :1], options())
    torch.testing.assert_close(output, value[:, :1, 390:391])


def test_nan_reaches_the_queries_that_see_it() -> None:
    for which in (1, 2):
        given = tensors(1, 2, 2, 200, 200, 16, 16)
        given[which][:, :, 150] = torch.nan
        query, key, value = given
        output = native_attention(query, key, value, options(causal=True))
        assert output[:, :, 150:].isnan().any(-1).all() and output[:, :, :100].isfinite().all()


def test_threads_batch_and_chunks_change_no_bit(isa: str) -> None:
    """A prompt read in pieces gives what it gives in one piece; so does each sequence alone."""
    query, key, value = tensors(3, 6, 2, 250, 450, 40, 40)
    for chosen in (options(causal=True), options(causal=True, window=100, alibi_slopes=torch.rand(6))):
        whole = native_attention(query, key, value, chosen)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(native_attention(query, key, value, chosen), whole)
        finally:
            torch.set_num_threads(before)
        for b in range(3):
            one = slice(b, b + 1)
            assert torch.equal(native_attention(query[one], key[one], value[one], chosen), whole[one])
        for start, end in ((0, 1), (1, 80), (80, 250)):
            seen = slice(0, 200 + end)
            part = native_attention(query[:, :, start:end], key[:, :, seen], value[:, :, seen], chosen)
            assert torch.equal(part, whole[:, :, start:end])


def test_log_sum_exp() -> None:
    query, key, value = tensors(2, 4, 2, 130, 250, 20, 8)
    _, lse = kernel.attention(query, key, value, False, None, 0.3, None, None, None, save=True)
    exact = (0.3 * query.double() @ key.double().repeat_interleave(2, 1).mT).logsumexp(-1)
    assert lse is not None
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=3e-6)


def test_refusals() -> None:
    query, key, value = tensors(1, 2, 2, 3, 3, 4, 4)
    assert ops.explain("attention", query, key, value).chosen == "cpu"
    for change in ({"dropout_p": 0.5}, {"query": query.double(), "key": key.double(), "value": value.double()}):
        assert ops.explain("attention", **{"query": query, "key": key, "value": value, **change}).chosen == "torch"


Gradients = tuple[Tensor, ...]


def gradients(given: list[Tensor], options: dict[str, Any], upstream: Tensor, backend: str) -> Gradients:
    leaves = [t.detach().requires_grad_() for t in given]
    with ops.backend(backend):
        return torch.autograd.grad(ops.attention(*leaves, **options), leaves, upstream.to(given[0].dtype))


def compare_gradients(
    given: list[Tensor], options: dict[str, Any], change: Callable[[Gradients], Gradients] = lambda found: found
) -> None:
    query, _, value = given
    upstream = torch.randn(*query.shape[:3], value.shape[3] + 1)[..., 1:]
    exact = gradients([t.double() for t in given], options, upstream, "reference")
    single = gradients(given, options, upstream, "reference")
    found = change(gradients(given, options, upstream, "cpu"))
    # Where a query sees one key, the gradients of queries and keys are 0 but for rounding: so all three as one.
    flat = [torch.cat([t.flatten() for t in three]) for three in (found, single, exact)]
    assert_close_to_reference(*flat, floor=5e-6)


@pytest.mark.parametrize("chosen", range(len(EVERY)))
@pytest.mark.parametrize("sizes", [(1, 1), (40, 300), (193, 193), (100, 60)])
def test_gradients(isa: str, chosen: int, sizes: tuple[int, int]) -> None:
    for kv_heads, dim, value_dim in ((2, 24, 40), (6, 64, 7)):
        compare_gradients(tensors(2, 6, kv_heads, *sizes, dim, value_dim), EVERY[chosen])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_gradients_under_a_mask(isa: str, kind: str) -> None:
    mask = a_mask(kind, 2, 1, 50, 210)
    assert mask is not None
    mask[:, :, 7] = False if kind == "bool" else -torch.inf
    compare_gradients(tensors(2, 6, 3, 50, 210, 16, 16), options(mask=mask, softcap=2.0))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gradients_of_any_shape(data: st.DataObject) -> None:
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    queries, keys = data.draw(st.integers(1, 3 * BLOCK_ROWS)), data.draw(st.integers(1, 2 * BLOCK_KEYS))
    dim, value_dim = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 130))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    window = data.draw(st.sampled_from([None, 1, 50, 500]))
    chosen = options(causal=data.draw(st.booleans()), window=window, scale=dim**-0.5)
    compare_gradients(tensors(batch, kv_heads * group, kv_heads, queries, keys, dim, value_dim), chosen)


@pytest.mark.parametrize("wrong", range(3))
def test_planted_faults_in_gradients_are_found(wrong: int) -> None:
    """The last key's share lost, the scale left out, a group's heads not added up: each in one of the gradients."""
    given = tensors(2, 4, 2, 200, 400, 33, 20)

    def change(found: Gradients) -> Gradients:
        query, key, value = (t.clone() for t in found)
        if wrong == 0:
            value[:, :, -1] = 0
        elif wrong == 1:
            query /= 0.3
        else:
            key /= 2
        return query, key, value

    compare_gradients(given, options(causal=True))
    with pytest.raises(AssertionError):
        compare_gradients(given, options(causal=True), change)


def test_gradients_do_not_depend_on_threads_nor_on_chance(isa: str) -> None:
    for batch, dim in ((1, 32), (3, 20)):
        given, upstream = tensors(batch, 6, 2, 250, 450, dim, dim), torch.randn(batch, 6, 250, dim)
        found = gradients(given, options(causal=True), upstream, "cpu")
        before = torch.get_num_threads()
        try:
            for threads in (before, 1):
                torch.set_num_threads(threads)
                again = gradients(given, options(causal=True), upstream, "cpu")
                assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        finally:
            torch.set_num_threads(before)


def test_gradients_that_the_kernel_leaves_to_others() -> None:
    query, key, value = (t.detach().clone().requires_grad_() for t in tensors(1, 2, 2, 3, 3, 4, 4))
    bias = torch.randn(3, 3, requires_grad=True)
    assert ops.explain("attention", query, key, value, mask=bias).chosen == "torch"
    grad = torch.autograd.grad(ops.attention(query, key, value).sum(), query, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"fastlm.backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), query)
