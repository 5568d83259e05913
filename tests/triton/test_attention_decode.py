"""The Triton decoding kernels: every two options together, split and paged caches, and what they may not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_close_to_reference
from torch import Tensor
from triton_mutants import mutant

from fastlm import ops
from fastlm.reference import attention_decode as reference
from fastlm.reference import kv_cache
from fastlm.reference.attention import attention as full_attention

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import attention_decode as kernel

FLOAT8 = torch.float8_e4m3fn
Decode = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short caches are split too."""
    monkeypatch.setattr(kernel, "CHUNK", 64)


def _case(
    device: str,
    tokens: int = 1,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 20,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    lengths: tuple[int, ...] = (200, 1, 65),
    page: int | None = None,
    slopes: str = "none",
    scales: str = "none",
    **options: Any,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of `attention_decode`, or of `attention_paged`; what no row may read is NaN, its pages do not exist."""
    batch, heads, size = len(lengths), kv_heads * group, page or max(208, *lengths)
    lengths = tuple(max(length, tokens) for length in lengths)
    cache = cache or dtype
    needed = [-(-length // size) if page else 1 for length in lengths]
    rows = sum(needed) + 2
    written = torch.randn(2, rows, kv_heads, size, dim) * (torch.rand(size, 1) + 0.2 if cache is torch.int8 else 1.0)
    keys, values = kv_cache.kv_written(written, cache)
    order = torch.randperm(rows).tolist()
    stored = torch.zeros(rows, size, dtype=torch.bool)
    table = torch.full((batch, max(needed) + 1), 1 << 40)
    for b, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        for i in range(count):
            table[b, i] = order.pop()
            stored[table[b, i], : min(size, length - i * size)] = True
    # Of bytes -1 an int8 cache's scales are NaN.
    nan = torch.tensor(-1 if cache is torch.int8 else torch.nan).to(cache)
    keys, values = (torch.where(stored[:, None, :, None], t, nan) for t in (keys, values))
    query = torch.randn(batch, heads, tokens, dim).to(dtype)
    if slopes != "none":
        options["alibi_slopes"] = (torch.rand(heads) if slopes == "head" else torch.rand(batch, heads)).to(device)
    arguments = [query, keys, values, torch.tensor(lengths)]
    if page:
        arguments.insert(3, table)
        if scales != "none":
            for name in ("key_scale", "value_scale"):
                options[name] = (torch.rand(1 if scales == "tensor" else kv_heads) + 0.5).to(device)
    else:
        options["rows"] = table[:, 0].to(device)
    return [t.to(device) for t in arguments], options


def _triton(*args: Any, **options: Any) -> Tensor:
    with ops.backend("triton"):
        return (ops.attention_paged if len(args) == 5 else ops.attention_decode)(*args, **options)


def _exact(args: list[Tensor], options: dict[str, Any]) -> Tensor:
    paged = len(args) == 5
    query, keys, values, *rest = (t.cpu() for t in args)
    o = dict.fromkeys(("scale", "window", "softcap", "alibi_slopes"))
    o |= dict.fromkeys(("key_scale", "value_scale")) if paged else {"rows": None}
    o |= {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    scale = query.shape[-1] ** -0.5 if o["scale"] is None else o["scale"]
    last = (scale, o["window"], o["softcap"], o["alibi_slopes"])
    if paged:
        run, middle = reference.attention_paged, (o["key_scale"], o["value_scale"])
        return run(query.double(), keys, values, *rest, *middle, *last)
    return reference.attention_decode(query.double(), keys, values, *rest, o["rows"], *last)


def compare(decode: Decode, args: list[Tensor], options: dict[str, Any]) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    exact = _exact(args, options)
    dtype = args[0].dtype
    # torch's own arithmetic in a narrow dtype rounds scores and weights too: at least the result's own rounding, twice.
    same = exact.to(dtype)
    floor = 4e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert_close_to_reference(decode(*args, **options).cpu(), same, exact, floor=floor)


COMBINATIONS = pairwise(
    tokens=[1, 3, 17],
    group=[1, 3, 4],
    dim=[16, 20, 80],
    kinds=[
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, FLOAT8),
        (torch.float32, FLOAT8),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.float16, torch.int8),
    ],
    page=[None, 16, 24, 64],
    window=[None, 1, 70],
    softcap=[None, 2.0],
    slopes=["none", "head", "row"],
    scales=["none", "tensor", "head"],
    lengths=[(200, 1, 65), (64,), (128, 33)],
)


@pytest.mark.parametrize("case", COMBINATIONS, ids=range(len(COMBINATIONS)))
def test_every_pair_of_options(device: str, case: dict[str, Any]) -> None:
    dtype, cache = case.pop("kinds")
    if cache is not FLOAT8 or case["page"] is None:  # a contiguous cache has no scales
        case["scales"] = "none"
    args, options = _case(device, dtype=dtype, cache=cache, **case)
    compare(_triton, args, options)


@pytest.mark.parametrize("dim", [1, 256])
def test_widths_at_the_ends(device: str, dim: int) -> None:
    compare(_triton, *_case(device, dim=dim, group=1, kv_heads=1, lengths=(90, 2)))


def test_float8_without_an_instruction_for_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = _case(device, cache=FLOAT8, page=32, dtype=torch.bfloat16, scales="head", dim=16)
    every = torch.arange(256, dtype=torch.uint8, device=device).view(FLOAT8)[torch.randperm(254)]
    every = every[every.float().isfinite()]
    args[1][args[3][0, 0], 0, :15] = every[:240].view(15, 16)
    expected = _triton(*args, **options)
    monkeypatch.setattr(kernel, "native_float8", lambda device: False)
    assert torch.equal(_triton(*args, **options), expected)
    args[2].view(torch.uint8)[args[3][2, 0], 0, 3, 5] = 0x7F  # the NaN of this format
    assert _triton(*args, **options)[2, :2, :, 5].isnan().all()


@pytest.mark.parametrize("page", [16, 64])
def test_pages_and_splits_equal_prefill(device: str, page: int) -> None:
    """Decoding from split, paged keys gives what full attention over the same tokens gives at those places."""
    tokens, length, kv_heads, group, dim = 5, 200, 2, 3, 24
    query = torch.randn(1, kv_heads * group, length, dim)
    key, value = torch.randn(2, 1, kv_heads, length, dim)
    whole = full_attention(*(t.double() for t in (query, key, value)), True, None, 0.2, 90, None, None, 0.0)
    count = -(-length // page)
    table = torch.randperm(count + 3)[:count]
    pages = torch.full((2, count + 3, kv_heads, page, dim), torch.nan)
    for i, number in enumerate(table.tolist()):
        part = torch.stack((key, value))[:, 0, :, i * page : (i + 1) * page]
        pages[:, number, :, : part.shape[2]] = part
    args = (query[:, :, -tokens:], *pages, table[None], torch.tensor([length]))
    got = _triton(*(t.to(device) for t in args), scale=0.2, window=90)
    assert_close_to_reference(got.cpu(), whole[:, :, -tokens:].float(), whole[:, :, -tokens:])


def test_a_row_depends_on_itself_alone(device: str) -> None:
    args, options = _case(device, lengths=(200, 1, 65, 130), window=150)
    together = _triton(*args, **options)
    query, keys, values, lengths = args
    for b in range(4):
        one = slice(b, b + 1)
        alone = _triton(query[one], keys, values, lengths[one], rows=options["rows"][one], window=150)
        assert torch.equal(together[one], alone)


def test_the_same_bits_from_pages_and_from_rows(device: str) -> None:
    args, options = _case(device, page=16, tokens=2)
    query, pages, lengths = args[0], args[1:3], args[4]
    table = args[3].where(args[3] < len(pages[0]), 0)
    rows = [cache[table].transpose(1, 2).flatten(2, 3).contiguous() for cache in pages]
    expected = _triton(query, *rows, lengths)
    assert torch.equal(_triton(*args, **options), expected)
    one = torch.arange(len(query), device=device)[:, None]
    assert torch.equal(_triton(query, *rows, one, lengths), expected)


def test_any_layout_of_the_block_table(device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    query, pages = torch.randn(2, 4, 1, 32, generator=generator), torch.randn(2, 9, 2, 16, 32, generator=generator)
    table = torch.randperm(9, generator=generator)[:8].view(2, 4)
    lengths = torch.tensor([60, 33])
    query, keys, values, table, lengths = (t.to(device) for t in (query, *pages, table, lengths))
    with ops.backend("triton"):
        expected = ops.attention_paged(query, keys, values, table, lengths)
        for other in (table.t().contiguous().t(), torch.stack((table, table), dim=-1)[..., 0]):
            assert torch.equal(ops.attention_paged(query, keys, values, other, lengths), expected)


def test_any_layout(device: str) -> None:
    args, options = _case(device)
    expected = _triton(*args, **options)
    query, keys, values, lengths = args
    by_position = torch.stack((keys, values), dim=-2).permute(2, 0, 1, 3, 4).contiguous()  # [S, R, KVH, 2, D]
    k, v = by_position.permute(3, 1, 2, 0, 4)
    double = torch.stack((lengths, lengths), dim=1)[:, 0]
    rows = torch.stack((options["rows"],) * 2, dim=1)[:, 0]
    assert torch.equal(_triton(query.mT.contiguous().mT, k, v, double, rows=rows), expected)
    own = [cache[options["rows"]] for cache in (keys, values)]
    assert torch.equal(_triton(query, *own, lengths), expected)


def test_keys_outside_the_window_are_not_read(device: str) -> None:
    args, options = _case(device, tokens=2, lengths=(200,), window=20)
    expected = _triton(*args, **options)
    for cache in args[1:3]:
        cache[:, :, :179] = torch.nan  # the query at 198 sees keys from 179 on
    assert torch.equal(_triton(*args, **options), expected)


def test_nan_and_infinity_are_not_hidden(device: str) -> None:
    args, options = _case(device, lengths=(200, 200), group=1, kv_heads=1)
    args[1][options["rows"][0], 0, 7, 3] = torch.nan
    output = _triton(*args, **options)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()
    args[1][options["rows"][0]] = torch.inf
    args[0][0] = -1.0  # every score of the first entry is -inf: a query that sees nothing
    assert (_triton(*args, **options)[0] == 0).all()


def test_nothing_to_do(device: str) -> None:
    caches = torch.randn(2, 3, 2, 5, 8, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert _triton(torch.randn(0, 4, 1, 8, device=device), *caches, none).shape == (0, 4, 1, 8)
    assert _triton(torch.randn(1, 4, 0, 8, device=device), *caches, none.new_zeros(1)).shape == (1, 4, 0, 8)


FAULTS = {
    "nothing": ("", ""),
    "chunks not rescaled": (
        'weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))',
        "weight = (m == m).to(tl.float32)",
    ),
    "blocks not rescaled": ("acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    "sum not rescaled": ("l * rescale +", "l +"),
    "last chunk dropped": ("written = chunk * CHUNK <= place", "written = chunk * CHUNK + CHUNK <= place"),
    "chunks beyond the length": ("written = chunk * CHUNK <= place", "written = chunk < chunks"),
    "query heads dealt out in turn": ("kv_head * GROUP + row % GROUP", "kv_head + row % GROUP * KV_HEADS"),
    "newest key left out": ("position[None, :] <= place[:, None]", "position[None, :] < place[:, None]"),
    "a key too many": ("position[None, :] <= place[:, None]", "position[None, :] <= place[:, None] + 1"),
    "window off by one": ("> place[:, None] - window", ">= place[:, None] - window"),
    "window's first key": ("- window + 1, 0)", "- window + 2, 0)"),
    "keys' scale forgotten": ("factor = factor * tl.load(key_scale + kv_head)", "factor = factor * 1.0"),
    "values' scale forgotten": ("acc = acc * tl.load(value_scale + kv_head)", "acc = acc * 1.0"),
    "values' scale of another head": ("tl.load(value_scale + kv_head)", "tl.load(value_scale)"),
    "wrong page": ("position // PAGE, mask", "position // PAGE * 0, mask"),
    "table of another sequence": ("index + batch * stride_ib", "index"),
    "slopes of another head": ("batch * stride_slopes + head", "batch * stride_slopes + head * 0"),
    "slopes of another sequence": ("batch * stride_slopes", "0"),
    "no cap": ("if SOFTCAP:", "if SOFTCAP and False:"),
    "the last keys dropped": (
        "BLOCK_N * BLOCK_N, end, BLOCK_N)",
        "BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N, BLOCK_N)",
    ),
    "contiguous: another sequence's row": ("cache_row = tl.load(index + batch * stride_ib)", "cache_row = batch"),
    "contiguous: another head of keys": (
        "cache_row * stride_kr + position",
        "cache_row * stride_kr - k_head + position",
    ),
    "int8: keys' scale of another head": ("key_scale + k_at,", "key_scale + (k_at - k_head),"),
    "int8: keys' scale of another key": ("key_scale + k_at,", "key_scale + (k_at - at * stride_ks),"),
    "int8: values' scale of another head": ("value_scale + v_at,", "value_scale + (v_at - v_head),"),
    "int8: values' scale of another page": ("value_scale + v_at,", "value_scale + (v_at - (pages - 1) * stride_vr),"),
    "int8: values' scale forgotten": ("p *= v_scale[None, :]", "p *= 1.0"),
    "int8: values' scale forgotten in float16": ("v.to(tl.float32) * v_scale[:, None]", "v.to(tl.float32)"),
    "int8: keys' scale forgotten": (
        "scores *= tl.load(key_scale + k_at, mask=stored, other=0.0)[None, :]",
        "scores *= 1.0 + 0.0 * tl.load(key_scale + k_at, mask=stored, other=0.0)[None, :]",
    ),
    "int8: bytes taken for words": ("UNIT: tl.constexpr = 4 if", "UNIT: tl.constexpr = 1 if"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault])
    monkeypatch.setattr(copy, "CHUNK", 128)
    common: dict[str, Any] = {"window": 170, "softcap": 2.0, "slopes": "row", "tokens": 3, "lengths": (250, 90)}
    scale = 0.4
    caches = [(torch.float32, FLOAT8, "head"), (torch.float32, torch.int8, "none"), (torch.float16, torch.int8, "none")]
    page = None if fault.startswith("contiguous") else 16
    if fault != "nothing":
        caches = caches[1:] if fault.startswith("int8") else caches[:1]

    def run(*args: Any, **o: Any) -> Tensor:
        last = (scale, o["window"], o["softcap"], o["alibi_slopes"])
        if page is None:
            return copy.attention_decode(*args, o["rows"], *last)
        return copy.attention_paged(*args, o.get("key_scale"), o.get("value_scale"), *last)

    def check() -> None:
        for dtype, cache, scales in caches:
            args, options = _case(device, **common, page=page, dtype=dtype, cache=cache, scales=scales)
            options["alibi_slopes"] *= 0.05  # far keys must keep some weight, or they could be dropped unnoticed
            compare(run, args, {**options, "scale": scale})

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_on_a_cpu_it_runs_only_when_asked(device: str) -> None:
    args, options = _case(device)
    explanation = ops.explain(ops.attention_decode, *args, **options)
    assert explanation.chosen == "cpu"
    assert dict(explanation.reasons)["triton"] == "there is no CUDA device"
    with ops.backend("triton"):
        assert ops.explain(ops.attention_decode, *args, **options).chosen == "triton"
        with pytest.raises(NotImplementedError, match="a gradient is wanted"):
            ops.attention_decode(args[0].requires_grad_(), *args[1:], **options)


def test_what_the_kernel_leaves_to_others(device: str) -> None:
    def reason(*args: Tensor, **options: Any) -> str:
        with ops.backend("triton"):
            op = ops.attention_paged if len(args) == 5 else ops.attention_decode
            return dict(ops.explain(op, *args, **options).reasons)["triton"] or ""

    args, options = _case(device)
    assert "float64" in reason(*(t.double() for t in args[:3]), args[3], **options)
    assert "not contiguous" in reason(args[0], args[1], args[2].mT.contiguous().mT, args[3], **options)
    args, options = _case(device, dim=257)
    assert "257 features" in reason(*args, **options)
    args, options = _case(device, page=16)
    assert "scales for a cache of torch.float32" in reason(*args, key_scale=torch.ones(1, device=device))
    args, options = _case(device, dim=18, cache=torch.int8)
    assert "multiples of 4 bytes" in reason(*args, **options)
