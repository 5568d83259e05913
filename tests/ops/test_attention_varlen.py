"""ops.attention_varlen: each sequence as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from naive_attention import naive_attention
from torch import Tensor

from fastlm import ops

STARTS_Q, STARTS_K = [0, 3, 3, 8, 9], [0, 5, 6, 10, 13]


def _tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(STARTS_Q[-1], 4, 3, dtype=dtype),
        torch.randn(STARTS_K[-1], 2, 3, dtype=dtype),
        torch.randn(STARTS_K[-1], 2, 5, dtype=dtype),
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return ops.attention_varlen(query, key, value, torch.tensor(STARTS_Q), torch.tensor(STARTS_K), **options)


def compare(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    expected = []
    for b in range(len(STARTS_Q) - 1):
        rows, columns = slice(*STARTS_Q[b : b + 2]), slice(*STARTS_K[b : b + 2])
        slopes = options.get("alibi_slopes")
        one = {**options, "alibi_slopes": slopes[b]} if slopes is not None and slopes.dim() == 2 else options
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[columns], value[columns]))
        expected.append(naive_attention(q, k, v, **one)[0].transpose(0, 1))
    torch.testing.assert_close(
        attend(query, key, value, **options), torch.cat(expected), rtol=1e-5, atol=1e-5, check_dtype=False
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "sinks": torch.randn(4)},
    {"causal": True, "window": 2, "softcap": 1.5, "scale": 0.7},
    {"causal": True, "top_left": True, "alibi_slopes": torch.rand(4, 4)},
    {"alibi_slopes": torch.rand(4)},
]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("chosen", range(len(OPTIONS)))
def test_each_sequence_by_itself(forced: bool, chosen: int) -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = _tensors(dtype)
        assert ops.explain(attend, *tensors, **OPTIONS[chosen]).chosen == "cpu"
        with ops.backend("reference") if forced else nullcontext():
            compare(attend, *tensors, **OPTIONS[chosen])


FAULTS: dict[str, Callable[..., Tensor]] = {
    "the second sequence begins a query early": lambda q, k, v, **o: ops.attention_varlen(
        q, k, v, torch.tensor([0, 2, 3, 8, 9]), torch.tensor(STARTS_K), **o
    ),
    "the keys of the next sequence": lambda q, k, v, **o: ops.attention_varlen(
        q, k, v, torch.tensor(STARTS_Q), torch.tensor([0, 6, 7, 10, 13]), **o
    ),
    "one sequence": lambda q, k, v, **o: ops.attention_varlen(
        q, k, v, torch.tensor([0, 9]), torch.tensor([0, 13]), **o
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    tensors = _tensors()
    compare(attend, *tensors, causal=True)
    with pytest.raises(AssertionError):
        compare(FAULTS[fault], *tensors, causal=True)


def test_gradients() -> None:
    tensors = [t.requires_grad_() for t in _tensors()]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, causal=True), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(9, 4)}, r"query is float32 \[9, 4\] on cpu, expected shape \[sum of Tq, H, D\]"),
        ({"key": torch.randn(13, 2, 4)}, r"key is .*expected shape \[sum of Tk, KVH, 3\]"),
        ({"key": torch.randn(13, 3, 3), "value": torch.randn(13, 3, 3)}, "key has 3 heads, expected a divisor"),
        ({"value": torch.randn(12, 2, 5)}, r"value is .*expected shape \[13, 2, Dv\]"),
        ({"value": torch.randn(13, 2, 5).half()}, "value is float16 .*expected the query's dtype"),
        ({"cu_seqlens_q": torch.tensor([0.0, 9.0])}, "cu_seqlens_q is float32 .*expected int32 or int64"),
        ({"cu_seqlens_q": torch.tensor([0, 8])}, r"cu_seqlens_q is \[0, 8\], expected numbers that rise from 0 to 9"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 3, 10, 13])}, r"cu_seqlens_k is \[0, 9, 3, 10, 13\], expected numbers"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k is .* from 0 to 13"),
        ({"cu_seqlens_k": torch.tensor([0, 13])}, r"cu_seqlens_k is int64 \[2\] on cpu, expected shape \[5\]"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"alibi_slopes": torch.rand(5, 4)}, r"alibi_slopes is .*expected shape \[4\] or \[4, 4\]"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1, expected 0 <= dropout_p < 1"),
        ({"sinks": torch.rand(2)}, r"sinks is .*expected shape \[4\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    query, key, value = _tensors(torch.float32)
    given = {
        "query": query, "key": key, "value": value,
        "cu_seqlens_q": torch.tensor(STARTS_Q), "cu_seqlens_k": torch.tensor(STARTS_K),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^attention_varlen: " + message):
        ops.attention_varlen(**{**given, **change})
