"""The formula of attention, against torch's operator and against loops over single numbers, in float64."""

from __future__ import annotations

import pytest
import torch
from naive_attention import naive_attention
from torch import Tensor
from torch.nn import functional

from fastlm.reference.attention import attention
from fastlm.reference.attention_decode import attention_decode


def _tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    defaults = {"causal": False, "mask": None, "scale": 0.5, "window": None, "softcap": None, "alibi_slopes": None}
    return attention(query, key, value, **{**defaults, **options}, dropout_p=0.0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_scaled_dot_product_attention(kv_heads: int, causal: bool) -> None:
    query, key, value = _tensors((2, 4, 6, 8), (2, kv_heads, 6, 8), (2, kv_heads, 6, 5))
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=0.5, enable_gqa=kv_heads != 4
    )
    torch.testing.assert_close(_attend(query, key, value, causal=causal), expected)


def test_last_query_is_aligned_with_the_last_key() -> None:
    query, key, value = _tensors((1, 2, 3, 4), (1, 2, 7, 4), (1, 2, 7, 4))
    full = torch.cat((torch.zeros(1, 2, 4, 4, dtype=torch.float64), query), dim=2)
    expected = functional.scaled_dot_product_attention(full, key, value, is_causal=True, scale=0.5)[:, :, 4:]
    torch.testing.assert_close(_attend(query, key, value, causal=True), expected)


def test_gradients() -> None:
    query, key, value = (t.requires_grad_() for t in _tensors((2, 4, 3, 3), (2, 2, 4, 3), (2, 2, 4, 2)))
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, m: _attend(q, k, v, causal=True, window=2, softcap=1.5, alibi_slopes=a, mask=m),
        (query, key, value, slopes, bias),
    )


def test_blind_queries_give_zero_and_finite_gradients() -> None:
    tensors = _tensors((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    query, key, value = (t.requires_grad_() for t in tensors)
    output = _attend(query, key, value, causal=True)  # the first two of five queries stand before the first key
    assert (output[:, :, :2] == 0).all()
    assert (output[:, :, 2:] != 0).all()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, :2] == 0).all()


def test_decode_is_attention_of_each_row_alone() -> None:
    query, keys, values = _tensors((3, 4, 2, 5), (4, 2, 9, 5), (4, 2, 9, 5))
    lengths, rows = torch.tensor([2, 9, 5]), torch.tensor([3, 0, 3])
    slopes = torch.rand(3, 4, dtype=torch.float64)
    got = attention_decode(query, keys, values, lengths, rows, 0.5, 3, 2.0, slopes)
    for b, (length, row) in enumerate(zip(lengths.tolist(), rows.tolist(), strict=True)):
        expected = naive_attention(
            query[b : b + 1],
            keys[row : row + 1, :, :length],
            values[row : row + 1, :, :length],
            causal=True,
            scale=0.5,
            window=3,
            softcap=2.0,
            alibi_slopes=slopes[b],
        )
        torch.testing.assert_close(got[b : b + 1], expected)
