"""ops.attention_decode: against full attention, the native kernel at every level, and what a row may depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decode_cases import Decode, compare, exact, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive_attention import naive_attention
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import attention_decode as kernel
from fastlm.ops.registry import _OPS
from fastlm.reference.kv_cache import kv_read, kv_width


def _native(*args: Any, **options: Any) -> Tensor:
    with ops.backend("cpu"):
        return ops.attention_decode(*args, **options)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_native_agrees_with_the_formula(isa: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    tokens, dim = data.draw(st.sampled_from([1, 2, 5, 35])), data.draw(st.integers(1, 70) | st.just(256))
    positions = data.draw(st.integers(tokens, 600))
    lengths = [data.draw(st.integers(tokens, positions)) for _ in range(batch)]
    heads = kv_heads * group
    slopes = [None, torch.rand(heads), torch.rand(batch, heads)][data.draw(st.integers(0, 2))]
    args, options = make_case(
        batch,
        heads,
        kv_heads,
        tokens,
        dim,
        lengths,
        positions,
        window=data.draw(st.sampled_from([None, 1, 17, 255, 256, 257])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        alibi_slopes=slopes,
        scale=data.draw(st.sampled_from([None, 0.3])),
    )
    compare(_native, args, options)


def test_naive_loops_agree(isa: str) -> None:
    args, options = make_case(2, 4, 2, 3, 5, [9, 3], 10, window=4, softcap=2.0, alibi_slopes=torch.rand(4))
    query, keys, values, lengths = args
    rows = options.pop("rows").tolist()
    for b in range(2):
        cut = slice(0, int(lengths[b]))
        expected = naive_attention(
            query[b : b + 1], keys[None, rows[b], :, cut], values[None, rows[b], :, cut], causal=True, **options
        )
        got = _native(*args, rows=torch.tensor(rows), **options)[b : b + 1]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = make_case(3, 6, 2, 3, 33, [3, 300, 513], 520)
    empty, made = torch.empty_strided, []

    def nan(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(empty(shape, stride, dtype=dtype, device=device).fill_(torch.nan))
        return made[-1]

    monkeypatch.setattr(torch, "empty_strided", nan)
    assert kernel.attention_decode(*args, options["rows"], 0.1, None, None, None).isfinite().all()
    assert made


def test_any_layout_of_cache_and_query(isa: str) -> None:
    (query, keys, values, lengths), options = make_case(3, 6, 2, 2, 19, [2, 30, 40], 41)
    expected = _native(query, keys, values, lengths, **options)
    by_position = torch.stack((keys, values), dim=-2).permute(2, 0, 1, 3, 4).contiguous()  # [S, R, KVH, 2, D]
    k, v = by_position.permute(3, 1, 2, 0, 4)
    q = query.transpose(1, 2).contiguous().transpose(1, 2)
    double = torch.stack((lengths, lengths), dim=1)[:, 0]
    rows = torch.stack((options["rows"],) * 2, dim=1)[:, 0]
    assert torch.equal(_native(q, k, v, double, rows=rows), expected)
    assert torch.equal(_native(query.mT.contiguous().mT, keys, values, lengths, **options), expected)


def test_a_row_depends_on_itself_alone(isa: str, threads: int) -> None:
    lengths = [700, 1, 256, 257, 512]
    args, options = make_case(5, 6, 2, 1, 40, lengths, 700, window=400)
    query, keys, values, _ = args
    together = _native(*args, **options)
    for b in range(5):
        one = slice(b, b + 1)
        alone = _native(query[one], keys, values, args[3][one], **{**options, "rows": options["rows"][one]})
        assert torch.equal(together[one], alone)
    torch.set_num_threads(3 - threads)
    assert torch.equal(together, _native(*args, **options))


def test_tokens_at_once_equal_tokens_one_by_one(isa: str) -> None:
    args, options = make_case(2, 6, 2, 37, 24, [300, 90], 301, window=50, alibi_slopes=torch.rand(6), softcap=3.0)
    query, keys, values, lengths = args
    together = _native(*args, **options)
    for t in range(37):
        one = _native(query[:, :, t : t + 1], keys, values, lengths - 36 + t, **options)
        assert torch.equal(together[:, :, t : t + 1], one)


def test_keys_outside_the_window_are_not_read(isa: str) -> None:
    args, options = make_case(1, 2, 1, 2, 16, [600], 600, window=20)
    expected = _native(*args, **options)
    for cache in args[1:3]:
        cache[:, :, :579] = torch.nan  # query 598 sees keys from 579 on
    assert torch.equal(_native(*args, **options), expected)


def test_nan_and_infinity_are_not_hidden(isa: str) -> None:
    args, options = make_case(2, 2, 1, 1, 8, [300, 300], 300)
    args[1][options["rows"][0], 0, 7, 3] = torch.nan
    output = _native(*args, **options)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()
    args[1][options["rows"][0]] = torch.inf
    args[0][0] = -1.0  # every score of the first entry is -inf: a query that sees nothing
    assert (_native(*args, **options)[0] == 0).all()
    assert (exact(args, options)[0] == 0).all()


def _without_rescale(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """Sums the chunks' numerators and denominators, each relative to its own largest score."""
    outputs = []
    for b, row in enumerate(options["rows"].tolist()):
        top = bottom = torch.zeros(())
        for start in range(0, int(lengths[b]), 256):
            part = slice(start, min(start + 256, int(lengths[b])))
            group = query.shape[1] // keys.shape[1]
            k, v = (c[row, :, part].repeat_interleave(group, 0) for c in (keys, values))
            scores = query[b] @ k.mT * query.shape[-1] ** -0.5
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            top, bottom = top + weights @ v, bottom + weights.sum(-1, keepdim=True)
        outputs.append(top / bottom)
    return torch.stack(outputs)


FAULTS: dict[str, Decode] = {
    "zeros": lambda *a, **o: torch.zeros_like(_native(*a, **o)),
    "chunks not rescaled": _without_rescale,
    "newest key left out": lambda q, k, v, n, **o: _native(q, k, v, n - 1, **o),
    "rows ignored": lambda q, k, v, n, rows: _native(q, k.nan_to_num(), v.nan_to_num(), n),
    "query heads dealt out in turn": lambda q, k, v, n, **o: _native(
        q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), n, **o
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    args, options = make_case(2, 4, 2, 1, 16, [600, 300], 600)
    compare(_native, args, options)
    with pytest.raises(AssertionError):
        compare(FAULTS[fault], args, options)


def test_a_window_off_by_one_is_found() -> None:
    args, options = make_case(2, 4, 2, 1, 16, [600, 300], 600, window=256)
    compare(_native, args, options)
    with pytest.raises(AssertionError):
        compare(lambda *a, **o: _native(*a, **{**o, "window": 257}), args, options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([5, 11])}, r"lengths\[1\] is 11, expected from 2 .*to 10"),
        ({"lengths": torch.tensor([1, 5])}, r"lengths\[0\] is 1, expected from 2"),
        ({"lengths": torch.tensor([5, -1])}, r"lengths\[1\] is -1"),
        ({"lengths": torch.tensor([5.0, 5.0])}, r"lengths is float32 \[2\] on cpu, expected int64 of shape \[2\]"),
        ({"rows": torch.tensor([0, 3])}, r"rows\[1\] is 3, expected 0 to 2"),
        ({"rows": torch.tensor([-1, 0])}, r"rows\[0\] is -1"),
        ({"rows": torch.tensor([0])}, r"rows is int64 \[1\] on cpu"),
        ({"query": torch.randn(2, 4, 8)}, "query is"),
        ({"query": torch.randn(2, 4, 2, 7)}, r"key_cache is .*expected torch.float32 of shape \[R, KVH, S, 7\]"),
        ({"query": torch.randn(2, 3, 2, 8)}, "key_cache has 2 heads, expected a divisor of the query's 3"),
        ({"query": torch.randn(4, 4, 2, 8), "lengths": torch.tensor([5] * 4)}, "key_cache has 3 rows, expected 4"),
        ({"value_cache": torch.randn(3, 2, 9, 8)}, "value_cache is"),
        ({"value_cache": torch.randn(3, 2, 10, 8).double()}, "value_cache is float64"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"alibi_slopes": torch.rand(2)}, "alibi_slopes is"),
    ],
)
def test_errors_name_the_argument(backend: str, change: dict[str, Any], message: str) -> None:
    call = {
        "query": torch.randn(2, 4, 2, 8),
        "key_cache": torch.randn(3, 2, 10, 8),
        "value_cache": torch.randn(3, 2, 10, 8),
        "lengths": torch.tensor([5, 6]),
    }
    with ops.backend(backend), pytest.raises(ValueError, match=r"^attention_decode: " + message):
        ops.attention_decode(**{**call, **change})


def test_the_default_device_does_not_matter(isa: str) -> None:
    args, options = make_case(2, 4, 2, 1, 10, [7, 9], 12)
    with torch.no_grad():
        expected = ops.attention_decode(*args, **options)
        torch.set_default_device("meta")
        try:
            found = ops.attention_decode(*args, **options)
        finally:
            torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("forced", ["reference", "cpu"])
def test_a_forced_backend_is_asked_even_so(forced: str) -> None:
    args, options = make_case(2, 4, 2, 1, 10, [7, 9], 12)
    with torch.no_grad():
        free = ops.attention_decode(*args, **options)
        with ops.backend(forced):
            got = ops.attention_decode(*args, **options)
        assert ops.explain("attention_decode", *args, **options).chosen == "cpu"
    assert torch.equal(free, got) == (forced == "cpu")


def test_what_the_kernel_leaves_to_others() -> None:
    (query, keys, values, lengths), options = make_case(1, 2, 1, 1, 8, [4], 5)

    def reason(*args: Tensor) -> str:
        explanation = ops.explain(ops.attention_decode, *args, lengths, **options)
        assert explanation.chosen == "reference"
        return dict(explanation.reasons)["cpu"] or ""

    assert ops.explain("attention_decode", query, keys, values, lengths, **options).chosen == "cpu"
    assert "float64" in reason(query.double(), keys.double(), values.double())
    assert "gradient" in reason(query, keys.clone().requires_grad_(), values)
    assert "not contiguous" in reason(query, keys, values.mT.contiguous().mT)
    wide = torch.randn(3, 1, 5, 257)
    assert "257 features" in reason(torch.randn(1, 2, 1, 257), wide, wide)


def test_without_the_native_module_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = make_case(2, 4, 2, 1, 16, [60, 30], 60)
    expected = _native(*args, **options)
    monkeypatch.setattr(native.CPU, "module", None)
    monkeypatch.setattr(native.CPU, "error", "it was not built")
    torch.testing.assert_close(ops.attention_decode(*args, **options), expected)
    with ops.backend("cpu"), pytest.raises(NotImplementedError, match="it was not built"):
        ops.attention_decode(*args, **options)


def test_empty_batch_and_no_tokens(isa: str) -> None:
    caches = (torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8))
    none = torch.empty(0, dtype=torch.int64)
    assert _native(torch.randn(0, 4, 1, 8), *caches, none).shape == (0, 4, 1, 8)
    assert _native(torch.randn(1, 4, 0, 8), *caches, torch.tensor([0])).shape == (1, 4, 0, 8)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "alibi_slopes": torch.rand(2, 4)}])
def test_masked_form_equals_the_formula(options: dict[str, Any]) -> None:
    """What runs on devices where reading the lengths would mean waiting, and what compiled backwards differentiate."""
    args, more = make_case(2, 4, 2, 3, 5, [9, 3], 10)
    (masked,) = (i.run for i in _OPS["attention_decode"].implementations if i.name == "torch")
    q, k, v = (t.double() for t in args[:3])
    options = {"scale": 0.3, "window": None, "softcap": None, "alibi_slopes": None, **options}
    got = masked(q, k, v, args[3], more["rows"], *options.values())
    torch.testing.assert_close(got, exact(args, {**more, **options}))


def _compiled_case() -> tuple[list[Tensor], tuple[Any, ...]]:
    args, options = make_case(2, 4, 2, 3, 8, [9, 3], 10)
    return [t.requires_grad_() for t in args[:3]], (args[3], options["rows"])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_opcheck(softcap: float | None) -> None:
    tensors, (lengths, rows) = _compiled_case()
    slopes = torch.rand(4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastlm.attention_decode.default, (*tensors, lengths, rows, 0.3, None, softcap, slopes)
    )


def test_compiles_in_one_graph() -> None:
    tensors, (lengths, rows) = _compiled_case()
    compiled = torch.compile(ops.attention_decode, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(2, 4, 3, 8)
    fast = torch.autograd.grad(compiled(*tensors, lengths, rows=rows), tensors, upstream)
    slow = torch.autograd.grad(ops.attention_decode(*tensors, lengths, rows=rows), tensors, upstream)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*tensors, lengths, rows=rows), ops.attention_decode(*tensors, lengths, rows=rows)
        )


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_few_bytes_is_read_as_the_floats_it_stands_for(
    isa: str, dtype: torch.dtype, window: int | None
) -> None:
    lengths = torch.tensor([300, 65, 3])
    for dim, heads, tokens in ((3, 2, 3), (64, 6, 1), (64, 8, 1), (100, 6, 3)):
        width = kv_width(dim, dtype)
        if dtype is torch.int8:  # 255 everywhere: scales that are NaN, next to integers of -1
            caches = [torch.full((3, 2, 300, width), -1, dtype=dtype) for _ in range(2)]
        else:
            caches = [torch.full((3, 2, 300, width), torch.nan).to(dtype) for _ in range(2)]
        for row, length in enumerate(lengths.tolist()):
            new = torch.randn(2, 1, 2, length, dim) * torch.rand(2, 1, 2, length, 1)
            ops.kv_append(*caches, *new, torch.tensor([0]), rows=torch.tensor([row]))
        query = torch.randn(3, heads, tokens, dim)
        plain = [kv_read(cache, torch.float32) for cache in caches]
        found = ops.attention_decode(query, *caches, lengths, window=window)
        want = ops.attention_decode(query, *plain, lengths, window=window)
        if dtype is torch.bfloat16 and not (native.CPU.require().matmul_tiles() and dim == 64):
            assert torch.equal(found, want)  # tiles add up in another order
        with ops.backend("reference"):
            by_reference = ops.attention_decode(query, *caches, lengths, window=window)
        for other in (want, by_reference):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
        # What the comparison must notice: keys taken for others, a scale forgotten.
        wrong = [ops.attention_decode(query, caches[0].roll(1, 1), caches[1], lengths, window=window)]
        if dtype is torch.int8:
            forgotten = [cache[..., :-4] * 0.01 for cache in caches]
            wrong += [
                ops.attention_decode(query, forgotten[0], plain[1], lengths, window=window),
                ops.attention_decode(query, plain[0], forgotten[1], lengths, window=window),
            ]
        for fault in wrong:
            assert not torch.allclose(found, fault, rtol=1e-4, atol=1e-5)
