"""ops.kv_append and ops.offset: where they write, and what they refuse to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops
from fastlm.reference.kv_cache import kv_read


def _expected(cache: Tensor, new: Tensor, starts: list[int], rows: list[int]) -> Tensor:
    """Token by token, as the docstring has it."""
    want = cache.clone()
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for t in range(new.shape[2]):
            want[row, :, start + t] = new[b, :, t]
    return want


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 4), heads=st.integers(1, 3), dim=st.integers(1, 9), turned=st.booleans())
def test_append_writes_those_places_alone(data: st.DataObject, tokens: int, heads: int, dim: int, turned: bool) -> None:
    cache_rows, positions = 5, 8
    rows = data.draw(st.permutations(range(cache_rows)))[: data.draw(st.integers(1, cache_rows))]
    starts = [data.draw(st.integers(0, positions - tokens)) for _ in rows]
    key, value = (torch.randn(len(rows), tokens, heads, dim).transpose(1, 2) for _ in range(2))
    if not turned:
        key, value = key.contiguous(), value.contiguous()
    in_order = rows == list(range(len(rows)))
    for backend in ("cpu", "reference"):
        keys, values = (torch.full((cache_rows, heads, positions, dim), torch.nan) for _ in range(2))
        index = None if in_order else torch.tensor(rows)
        want = [_expected(c, new, starts, rows) for c, new in ((keys, key), (values, value))]
        with ops.backend(backend):
            ops.kv_append(keys, values, key, value, torch.tensor(starts), rows=index)
        torch.testing.assert_close((keys, values), tuple(want), rtol=0, atol=0, equal_nan=True)


def test_append_refuses_what_does_not_fit() -> None:
    cache = torch.zeros(2, 3, 4, 5)
    new = torch.zeros(2, 3, 2, 5)
    start = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"key is float64 .*one dtype"):
        ops.kv_append(cache, cache, new.double(), new, start)
    with pytest.raises(ValueError, match=r"key is float32 \[2, 1, 2, 5\].*does not fit a cache of \[2, 3, 4, 5\]"):
        ops.kv_append(cache, cache, new[:, :1], new[:, :1], start)
    with pytest.raises(ValueError, match=r"starts is int64 \[1\].*expected contiguous int64 \[2\]"):
        ops.kv_append(cache, cache, new, new, start[:1])
    for rows, first in ((None, 3), (None, -1), (torch.tensor([0, 2]), 0)):
        with pytest.raises((ValueError, IndexError)):
            ops.kv_append(cache, cache, new, new, start + first, rows=rows)
    assert not cache.any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_offset_moves_integers(backend: str) -> None:
    with ops.backend(backend):
        target = torch.full((4,), -1)
        ops.offset(
            torch.tensor([10, 20, 30]), 5, out=target, source_index=torch.tensor([2, 0]), out_index=torch.tensor([1, 3])
        )
        assert target.tolist() == [-1, 35, -1, 15]
        ops.offset(target, 1, out=target)
        assert target.tolist() == [0, 36, 0, 16]
        some = torch.tensor([3, 1])
        ops.offset(target, 100, out=target, source_index=some, out_index=some)
        assert target.tolist() == [0, 136, 0, 116]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_offset_refuses_what_does_not_fit(backend: str) -> None:
    a = torch.arange(3)
    with ops.backend(backend):
        with pytest.raises(ValueError, match="2 elements for 3 places"):
            ops.offset(a, out=torch.zeros(3, dtype=torch.int64), source_index=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="out is float32"):
            ops.offset(a, out=torch.zeros(3))
        with pytest.raises(IndexError):
            ops.offset(a, out=torch.zeros(1, dtype=torch.int64), source_index=torch.tensor([3]))


def test_opcheck() -> None:
    cache = (torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 8, 4))
    new = (torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4))
    starts, rows = torch.tensor([1, 4]), torch.tensor([2, 0])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastlm.kv_append.default, (*cache, *new, starts, rows), test_utils=tests)
    source, out = torch.arange(3), torch.zeros(5, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.fastlm.offset.default, (source, 2, out, None, starts.new_tensor([0, 2, 4])), test_utils=tests
    )


def test_compiles_in_one_graph() -> None:
    def step(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        starts = torch.empty_like(lengths)
        ops.offset(lengths, out=starts)
        ops.kv_append(keys, values, key, value, starts)
        ops.offset(starts, key.shape[2], out=lengths)
        return keys.sum(dim=(1, 2, 3))

    key, value = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        keys, values, lengths = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4), torch.tensor([1, 4])
        found.append((function(keys, values, key, value, lengths), keys, values, lengths))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][3].tolist() == [4, 7]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bfloat16_cache_rounds_as_torch_does(backend: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (1, 2, 500, 8), dtype=torch.int64).to(torch.int32)
    new = bits.view(torch.float32)  # every kind of float, NaN among them
    new[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    keys, values = (torch.zeros(1, 2, 500, 8, dtype=torch.bfloat16) for _ in range(2))
    with ops.backend(backend):
        ops.kv_append(keys, values, new, new.flip(2), torch.tensor([0]))
    torch.testing.assert_close(keys, new.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, new.flip(2).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_an_int8_cache_holds_rounded_numbers_and_their_scale(isa: str) -> None:
    new = torch.randn(2, 3, 50, 20) * torch.logspace(-20, 20, 50)[:, None]
    new[0, 0, 0] = 0.0
    new[0, 0, 1] = 1e-31  # below what has a scale
    new[0, 0, 2, 3], new[0, 0, 3, 19], new[0, 0, 4, 0] = torch.nan, torch.inf, -torch.inf
    new[0, 0, 5] = torch.arange(20) - 9.5
    found = []
    for backend in ("cpu", "reference"):
        caches = [torch.full((2, 3, 50, 24), 7, dtype=torch.int8) for _ in range(2)]
        with ops.backend(backend):
            ops.kv_append(*caches, new, new.flip(3), torch.zeros(2, dtype=torch.int64))
        found.append(caches)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[..., :20], b[..., :20])
        scales = [cache[..., 20:].contiguous().view(torch.float32) for cache in (a, b)]
        torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
    held = kv_read(found[0][0], torch.float32)
    assert held[0, 0, 2:5].isnan().all() and held[0, 0, :2].eq(0).all() and held[0, 0, 5:].isfinite().all()
    step = new.abs().amax(-1, keepdim=True) / 127
    assert ((held - new).abs() <= step * 0.5001)[:, :, 5:].all()
    assert not ((held - new).abs() <= step * 0.25)[:, :, 5:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float8_cache_rounds_to_nearest_and_cuts_off(dtype: torch.dtype) -> None:
    new = (torch.randn(1, 2, 60, 8) * torch.logspace(-4, 4, 60)[:, None]).to(dtype)
    new[0, 0, 0] = torch.tensor([448.0, 449.0, -1e4, torch.inf, -torch.inf, torch.nan, 2**-9, 2**-11])
    keys, values = (torch.zeros(1, 2, 60, 8).to(torch.float8_e4m3fn) for _ in range(2))
    ops.kv_append(keys, values, new, new.flip(2), torch.tensor([0]))
    assert torch.equal(values.view(torch.uint8), keys.flip(2).view(torch.uint8))
    held, limit = kv_read(keys, torch.float64), 448.0
    wanted = torch.tensor([limit, limit, -limit, limit, -limit, torch.nan, 2**-9, 0.0], dtype=torch.float64)
    torch.testing.assert_close(held[0, 0, 0], wanted, rtol=0, atol=0, equal_nan=True)
    # Every number of the format: the nearest is what has to be found.
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    exact = new[0, 1].double()
    nearest = (exact[..., None] - every).abs().amin(-1)
    assert torch.equal((exact - held[0, 1]).abs(), nearest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_int8_cache_of_narrow_keys(dtype: torch.dtype) -> None:
    """The same bytes as for the same numbers in float32, which our kernel writes."""
    new = torch.randn(2, 1, 2, 5, 12).to(dtype)
    caches = torch.zeros(2, 2, 1, 2, 6, 16, dtype=torch.int8)
    for found, numbers in zip(caches, (new, new.float()), strict=True):
        ops.kv_append(*found, *numbers, torch.tensor([1]))
    assert caches[0].any() and torch.equal(*caches)
    query = torch.randn(1, 4, 1, 12).to(dtype)
    found = ops.attention_decode(query, *caches[0], torch.tensor([6]))
    expected = ops.attention_decode(query.float(), *caches[0], torch.tensor([6]))
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_an_int8_cache_needs_room_for_its_scales() -> None:
    cache, new = torch.zeros(1, 1, 4, 8, dtype=torch.int8), torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="does not fit a cache"):
        ops.kv_append(cache, cache.clone(), new, new, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"key_cache is int8.* expected .* \[R, KVH, S, 12\]"):
        ops.attention_decode(new, cache, cache, torch.tensor([1]))
