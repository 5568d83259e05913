"""What the tests of this folder stand on: bfloat16 and float8 in the interpreter are those of a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")


@triton.jit
def _product(a, b, out):
    index = tl.arange(0, 16)
    square = index[:, None] * 16 + index[None, :]
    product = tl.dot(tl.load(a + square), tl.load(b + square))
    tl.store(out + square, product.to(out.dtype.element_ty))


@triton.jit
def _widen(source, out, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(out + index, tl.load(source + index).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_and_rounding(device: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, device=device).to(dtype)
    out = torch.full_like(a, torch.nan)
    _product[(1,)](a, b, out)
    torch.testing.assert_close(
        out, (a.float() @ b.float()).to(dtype), rtol=1e-6 if dtype is torch.float16 else 0, atol=0
    )


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 before sm_89"
)
def test_every_float8(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    out = torch.zeros(256, device=device)
    _widen[(1,)](codes, out, 256)
    torch.testing.assert_close(out, codes.float(), rtol=0, atol=0, equal_nan=True)


def test_integers_become_bfloat16(device: str) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device)
    out = torch.zeros(256, device=device, dtype=torch.bfloat16)
    _widen[(1,)](codes, out, 256)
    assert torch.equal(out, codes.bfloat16())
