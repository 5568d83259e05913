"""KV caches and recurrent states: where tokens go, what is shared, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm.nn.state import KVCache, RecurrentState
from fastlm.reference.kv_cache import kv_read


def cache(rows: int = 3, max_length: int = 9, fill: float = float("nan")) -> KVCache:
    found = KVCache.allocate(rows, max_length, num_layers=2, num_kv_heads=2, head_dim=4)
    for tensor in (*found.keys, *found.values):
        tensor.fill_(fill)
    return found


def tokens(batch: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, count, 4), torch.randn(batch, 2, count, 4)


def test_append_writes_behind_each_row() -> None:
    state = cache()
    state.lengths[:] = torch.tensor([0, 4, 2])
    k, v = tokens(2, 3)
    state.append(1, k, v, rows=[2, 0])
    assert state.lengths.tolist() == [0, 4, 2]
    assert torch.equal(state.keys[1][2, :, 2:5], k[0]) and torch.equal(state.values[1][0, :, 0:3], v[1])
    written = ~torch.isnan(state.keys[1])
    assert written.sum() == k.numel() and not written[1].any()
    assert torch.isnan(state.keys[0]).all()
    state.advance(3, rows=[2, 0])
    assert state.lengths.tolist() == [3, 4, 5]


def test_row_is_a_view() -> None:
    state = cache()
    row = state.row(1)
    k, v = tokens(1, 2)
    row.append(0, k, v)
    row.advance(2)
    assert state.lengths.tolist() == [0, 2, 0] and torch.equal(state.keys[0][1, :, :2], k[0])
    state.reset([1])
    assert row.lengths.tolist() == [0] and row.rows == 1 and row.max_length == 9


def test_size_is_what_was_asked_for() -> None:
    state = KVCache.allocate(2, 5, num_layers=3, num_kv_heads=4, head_dim=8, dtype=torch.float16)
    assert state.nbytes == 2 * 3 * 2 * 5 * 4 * 8 * 2
    with pytest.raises(ValueError, match="rows=2, max_length=0"):
        KVCache.allocate(2, 0, num_layers=1, num_kv_heads=1, head_dim=1)


def test_a_refused_step_changes_nothing() -> None:
    state = cache()
    state.lengths[:] = torch.tensor([0, 8, 0])
    k, v = tokens(3, 2)
    with pytest.raises(ValueError, match="row 1 holds 8 tokens; 2 more exceed its max_length of 9"):
        state.append(0, k, v)
    assert torch.isnan(state.keys[0]).all()
    with pytest.raises(ValueError, match="rows: 2 of the state's 3 rows for a batch of 3"):
        state.append(0, k, v, rows=[0, 2])


@settings(deadline=None, max_examples=60)
@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    count=st.integers(1, 3),
    window=st.none() | st.integers(1, 5),
    data=st.data(),
)
def test_attention_sees_each_rows_tokens_and_no_others(
    starts: list[int], count: int, window: int | None, data: st.DataObject
) -> None:
    # Every path (even rows, one row, ragged) against the reference on each row alone, with NaN wherever nothing is.
    rows = data.draw(st.permutations(range(len(starts))))[: data.draw(st.integers(1, len(starts)))]
    chosen = None if rows == list(range(len(starts))) else rows
    state = cache(len(starts))
    for row, start in enumerate(starts):
        if start:
            state.row(row).append(0, *tokens(1, start))
            state.row(row).advance(start)
    step = state.step(len(rows), count, chosen)
    k, v = tokens(len(rows), count)
    step.append(0, k, v)
    query = torch.randn(len(rows), 4, count, 4)
    found = step.attend(0, query, window)
    state.advance(count, chosen)
    for entry, row in enumerate(rows):
        end = int(state.lengths[row])
        assert end == starts[row] + count
        keys, values = state.keys[0][row, :, :end], state.values[0][row, :, :end]
        scores = query[entry] @ keys.repeat_interleave(2, 0).mT / 2
        i, j = torch.arange(count)[:, None] + end - count, torch.arange(end)
        visible = (j <= i) & (j > i - (window or end + 1))
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values.repeat_interleave(2, 0)
        assert torch.allclose(found[entry], expected, atol=1e-5)


def test_recurrent_state_has_the_same_surface() -> None:
    state = RecurrentState.allocate(3, [4, 2], cells=True)
    assert (state.rows, state.max_length, state.lengths.tolist()) == (3, None, [0, 0, 0])
    h, c = torch.randn(2, 4), torch.randn(2, 4)
    state.write(0, h, c, rows=[2, 0])
    state.advance(5, rows=[2, 0])
    assert torch.equal(state.h[0][2], h[0]) and torch.equal(state.row(0).c[0][0], c[1])  # type: ignore[index]
    assert state.lengths.tolist() == [5, 0, 5] and not state.h[0][1].any() and not state.h[1].any()
    found_h, found_c = state.read(0, rows=[0, 2])
    assert torch.equal(found_h, h.flip(0)) and found_c is not None and torch.equal(found_c, c.flip(0))
    row = state.row(2)
    row.reset()
    assert not state.h[0][2].any() and state.lengths.tolist() == [5, 0, 0] and state.h[0][0].any()


def test_recurrent_state_cuts_the_gradient() -> None:
    state = RecurrentState.allocate(1, [2], cells=False)
    weight = torch.ones(2, requires_grad=True)
    for _ in range(2):
        h, _ = state.read(0)
        h = h * weight + weight
        state.write(0, h, None)
    # d h2 / d weight = h1 + 1, with h1 taken as a constant; were it not cut, there would be one more.
    h.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 2.0]
    assert state.h[0].tolist() == [[2.0, 2.0]] and not state.h[0].requires_grad


@pytest.mark.parametrize("counts", [[40, 1, 1], [5, 30, 1]])
@pytest.mark.parametrize(
    ("dtype", "bytes_per_feature"), [(torch.bfloat16, 2), (torch.int8, 1.25), (torch.float8_e4m3fn, 1)]
)
def test_a_smaller_cache_attends_to_rounded_keys_and_values(
    dtype: torch.dtype, bytes_per_feature: float, counts: list[int]
) -> None:
    small = KVCache.allocate(1, 80, num_layers=1, num_kv_heads=2, head_dim=16, dtype=dtype)
    full = KVCache.allocate(1, 80, num_layers=1, num_kv_heads=2, head_dim=16)
    assert small.nbytes == full.nbytes / 4 * bytes_per_feature
    for count in counts:
        query, (key, value) = torch.randn(1, 4, count, 16), torch.randn(2, 1, 2, count, 16)
        step = small.step(1, count)
        step.append(0, key, value)
        found = step.attend(0, query)
        # What it now holds of the new tokens, appended to the other cache.
        end = int(small.lengths[0]) + count
        held = [kv_read(t[0][:, :, end - count : end], torch.float32) for t in (small.keys, small.values)]
        other = full.step(1, count)
        other.append(0, *held)
        torch.testing.assert_close(found, other.attend(0, query), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(held[0], key, rtol=1e-5, atol=1e-6)
        small.advance(count)
        full.advance(count)
