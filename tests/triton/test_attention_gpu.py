"""The Triton attention as a GPU runs it: the shipped tiles, long sequences, addresses beyond 2^31. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from torch import Tensor
from triton_attention import build, compare

from fastlm import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(dtype: torch.dtype, dim: int, causal: bool) -> None:
    if dtype is torch.float32 and dim > 128:
        pytest.skip("float32 gradients of more than 128 features a head are left to others")
    for lengths in ((1024, 1024), (1000, 1300), (1, 3000), (7, 999)):
        case = build("cuda", batch=1, dtype=dtype, lengths=lengths, dims=(dim, dim), causal=causal, layout="strided")
        compare(case)


@pytest.mark.parametrize("layout", ["contiguous", "packed"])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_option_at_once(layout: str, dim: int) -> None:
    mask = "none" if layout == "packed" else "additive"
    for dtype in (torch.float16, torch.bfloat16):
        case = build(
            "cuda", dtype=dtype, lengths=(500, 700), dims=(dim, dim), causal=True, window=300, softcap=5.0, alibi=2,
            mask=mask, sinks=True, layout=layout,
        )  # fmt: skip
        compare(case)


def test_the_same_bits_every_time() -> None:
    tensors = [torch.randn(2, heads, 2000, 128, device="cuda").bfloat16() for heads in (8, 2, 2)]
    upstream = torch.randn_like(tensors[0])

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = ops.attention(*leaves, causal=True)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(run(), first, strict=True))


def test_addresses_beyond_32_bits() -> None:
    """A head that begins 2^31 numbers after the other, and positions as far apart as that."""
    query = torch.randn(1, 2, 200, 64, device="cuda").half()
    far = torch.zeros(2**31 + 200 * 64, dtype=torch.float16, device="cuda")
    for stride in ((0, 2**31, 64, 1), (0, 64, 2**31 // 199 // 8 * 8, 1)):
        key = far.as_strided((1, 2, 200, 64), stride).copy_(torch.randn(1, 2, 200, 64, device="cuda"))
        leaves = [t.requires_grad_() for t in (query, key.detach(), key.detach())]
        near = [t.detach().contiguous().requires_grad_() for t in leaves]
        found = torch.autograd.grad(ops.attention(*leaves, causal=True).float().square().sum(), leaves)
        expected = torch.autograd.grad(ops.attention(*near, causal=True).float().square().sum(), near)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_is_chosen() -> None:
    tensors = [torch.randn(1, 2, 8, 64, device="cuda").bfloat16() for _ in range(3)]
    assert ops.explain("attention", *tensors, causal=True).chosen == "triton"
