"""ops.attention_paged without a GPU: the formula against contiguous caches, what other devices run, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops.attention_paged import ATTENTION_PAGED
from fastlm.reference.kv_cache import kv_read, kv_written


def _case(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Sequences of 9, 3 and 8 tokens in pages of 4, one of which two of them share; what nobody may read is NaN."""
    pages = torch.randn(2, 7, 2, 4, 5, dtype=dtype)
    pages[:, 5, :, 1:] = torch.nan
    pages[:, 0] = torch.nan
    pages[:, 3, :, 3:] = torch.nan
    nowhere = 1 << 40
    table = torch.tensor([[4, 2, 5], [3, nowhere, nowhere], [4, 6, nowhere]])
    return {
        "query": torch.randn(3, 4, 3, 5, dtype=dtype),
        "key_pages": pages[0],
        "value_pages": pages[1],
        "block_table": table,
        "lengths": torch.tensor([9, 3, 8]),
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3, "softcap": 2.0, "alibi_slopes": torch.rand(3, 4), "scale": 0.3},
    {"key_scale": torch.tensor([0.5, 2.0]), "value_scale": torch.tensor([3.0])},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_contiguous_caches(options: dict[str, Any]) -> None:
    case = _case()
    table = case["block_table"].where(case["block_table"] < 7, 0)
    caches = [case[name][table].transpose(1, 2).flatten(2, 3) for name in ("key_pages", "value_pages")]
    plain = {name: value for name, value in options.items() if not name.endswith("_scale")}
    for i, name in enumerate(("key_scale", "value_scale")):
        if name in options:
            caches[i] = caches[i] * options[name].double()[:, None, None]
    expected = ops.attention_decode(case["query"], *caches, case["lengths"], **plain)
    torch.testing.assert_close(ops.attention_paged(**case, **options), expected)
    (gathered,) = (i.run for i in ATTENTION_PAGED.implementations if i.name == "torch")
    names = ("key_scale", "value_scale", "scale", "window", "softcap", "alibi_slopes")
    rest = [options.get(name, 5**-0.5 if name == "scale" else None) for name in names]
    torch.testing.assert_close(gathered(*case.values(), *rest), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_few_bytes_are_read_as_the_floats_they_stand_for(dtype: torch.dtype) -> None:
    case = _case(torch.float32)
    narrow = {name: kv_written(case[name], dtype) for name in ("key_pages", "value_pages")}
    wide = {name: kv_read(pages, torch.float32) for name, pages in narrow.items()}
    expected = ops.attention_paged(**{**case, **wide})
    assert torch.equal(ops.attention_paged(**{**case, **narrow}), expected)
    (gathered,) = (i.run for i in ATTENTION_PAGED.implementations if i.name == "torch")
    rest = (None, None, 5**-0.5, None, None, None)
    torch.testing.assert_close(gathered(*{**case, **narrow}.values(), *rest), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(3, 4, 5)}, "query is"),
        ({"query": torch.randn(3, 3, 3, 5)}, "key_pages has 2 heads, expected a divisor of the query's 3"),
        (
            {"key_pages": torch.randn(7, 2, 4, 6)},
            r"key_pages is .*expected torch.float32, .* of shape \[P, KVH, page, 5\]",
        ),
        ({"value_pages": torch.randn(6, 2, 4, 5)}, "value_pages is"),
        (
            {"value_pages": torch.randn(7, 2, 4, 5).bfloat16()},
            "value_pages is bfloat16 .*expected torch.float32 as keys",
        ),
        (
            {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
            r"block_table is int64 \[2, 3\] on cpu, expected .*\[3, M\]",
        ),
        ({"block_table": torch.full((3, 3), 7)}, r"block_table\[0\] is \[7, 7, 7\], expected 0 to 6"),
        ({"lengths": torch.tensor([13, 3, 3])}, r"lengths\[0\] is 13, expected from 3 .* to 12 \(3 pages of 4\)"),
        ({"lengths": torch.tensor([9, 2, 3])}, r"lengths\[1\] is 2"),
        ({"lengths": torch.tensor([9, 3])}, r"lengths is int64 \[2\]"),
        ({"key_scale": torch.ones(3)}, r"key_scale is float32 \[3\] on cpu, expected floats of shape \[1\] or \[2\]"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^attention_paged: " + message):
        ops.attention_paged(**{**_case(torch.float32), **change})


def test_compiles_in_one_graph() -> None:
    case = {name: value.nan_to_num() if value.is_floating_point() else value for name, value in _case().items()}
    case["query"].requires_grad_()
    compiled = torch.compile(ops.attention_paged, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    (fast,) = torch.autograd.grad(compiled(**case), case["query"], upstream)
    (slow,) = torch.autograd.grad(ops.attention_paged(**case), case["query"], upstream)
    torch.testing.assert_close(fast, slow)
