"""Linear layers and losses whose products the tile unit makes, and the same without it: as accurate as torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import matmul
from fastlm.ops.quantized import QuantizedTensor

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


@pytest.fixture(params=["tiles", "plain"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`float_matmul` for every product: on the tile unit, where there is one, and in plain code."""
    module = native.CPU.require()
    module.matmul_allow_tiles(request.param == "tiles")
    for place in ("fastlm.kernels.cpu.matmul.float_worthwhile", "fastlm.ops.linear_float.float_worthwhile"):
        monkeypatch.setattr(place, lambda *_: True)
    yield
    module.matmul_allow_tiles(True)


def _error(found: Tensor, exact: Tensor, size: Tensor) -> tuple[float, float]:
    """Largest and root mean square, of what adding up magnitudes gives."""
    relative = (found.double() - exact) / size
    return float(relative.abs().max()), float(relative.square().mean().sqrt())


def _factors(kind: str, rows: int, depth: int, columns: int) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    if kind == "badly scaled":
        scale = torch.exp2(torch.randint(-30, 30, (depth,)).float())
        return a * scale, b / scale[:, None] * torch.exp2(torch.randint(-20, 20, (columns,)).float())
    if kind == "cancelling":
        return a[:, : depth // 2].repeat_interleave(2, dim=1), (
            b[: depth // 2].repeat_interleave(2, dim=0) * torch.tensor([1.0, -1 - 2**-18]).repeat(depth // 2)[:, None]
        )
    return a, b


@pytest.mark.parametrize("kind", ["normal", "badly scaled", "cancelling"])
@pytest.mark.parametrize("depth", [32, 256, 1000, 4096])
def test_no_less_accurate_than_torch(kind: str, depth: int, tiles: None) -> None:
    a, b = _factors(kind, 34, depth, 70)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    ours, theirs = _error(matmul.float_matmul(a, b), exact, size), _error(a @ b, exact, size)
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_float_matmul(dtype: torch.dtype, turned: bool, tiles: None) -> None:
    a, b = torch.randn(45, 70), torch.randn(70, 50).to(dtype)
    left, right = (a.t().contiguous().t(), b.t().contiguous().t()) if turned else (a, b)
    bias, held = torch.randn(50), torch.randn(45, 60)
    exact = a.double() @ b.double()
    assert torch.allclose(matmul.float_matmul(left, right, bias=bias).double(), exact + bias, atol=3e-6)
    kept = held.clone()
    matmul.float_matmul(left, right, out=held[:, 5:55], add=True)
    assert torch.allclose(held[:, 5:55].double(), exact + kept[:, 5:55], atol=3e-6)
    assert torch.equal(held[:, :5], kept[:, :5]) and torch.equal(held[:, 55:], kept[:, 55:])


def test_rows_and_threads_change_no_bit(tiles: None) -> None:
    a, b = torch.randn(300, 200), torch.randn(200, 150)
    whole = matmul.float_matmul(a, b)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(matmul.float_matmul(a, b), whole)
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (7, 24), (100, 140)):
        assert torch.equal(matmul.float_matmul(a[first:last], b), whole[first:last])


@pytest.mark.parametrize("biased", [False, True])
def test_linear_and_its_gradients(biased: bool, tiles: None) -> None:
    x, weight, bias = torch.randn(2, 100, 96), torch.randn(130, 96), torch.randn(130) if biased else None
    upstream = torch.randn(2, 100, 130)
    found = []
    for linear, dtype in ((ops.linear, torch.float32), (functional.linear, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        y = linear(*leaves)
        assert linear is functional.linear or "_FloatLinear" in type(y.grad_fn).__name__
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for a, b in zip(*found, strict=True):
        assert a.dtype is torch.float32 and a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=2e-5)


def test_second_derivative(tiles: None) -> None:
    x, weight = torch.randn(200, 96, requires_grad=True), torch.randn(130, 96, requires_grad=True)
    found = []
    for linear in (ops.linear, functional.linear):
        (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_weights_of_files(kind: str, tiles: None) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    weight, x = torch.randn(140, 96).to(dtype), torch.randn(200, 96)
    stored = QuantizedTensor(weight.view(torch.uint8), kind, (140, 96))
    found = ops.linear(x, stored)
    assert torch.equal(found, matmul.float_matmul(x, weight.t()))
    assert torch.equal(ops.linear_group(x, [stored], [None])[0], found)
    assert torch.allclose(found.double(), x.double() @ weight.double().t(), atol=2e-5)


def test_cross_entropy(tiles: None) -> None:
    hidden, weight, target = torch.randn(200, 96), torch.randn(300, 96), torch.randint(300, (200,))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = (
            ops.cross_entropy(*leaves, target, chunk_size=80)
            if dtype is torch.float32
            else functional.cross_entropy(leaves[0] @ leaves[1].t(), target)
        )
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(256, 256), torch.randn(256, 256, requires_grad=True)
    module = native.CPU.require()
    monkeypatch.setattr(module, "matmul_tiles", lambda: True)
    assert "-> cpu" in str(fastlm.explain(ops.linear, x, weight))
    monkeypatch.undo()
    module.matmul_allow_tiles(False)
    try:
        assert not module.matmul_tiles()
        assert "-> torch" in str(fastlm.explain(ops.linear, x, weight))
    finally:
        module.matmul_allow_tiles(True)


@pytest.mark.parametrize("setting", ["0", "1", "no"])
def test_the_environment_turns_it_off(setting: str) -> None:
    code = "from fastlm.kernels import native; print(native.CPU.module.matmul_tiles())"
    environment = {**os.environ, "FASTLM_AMX": setting}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if setting == "no":
        assert done.returncode != 0 and "FASTLM_AMX='no', expected 0 or 1" in done.stderr
    else:
        assert done.stdout.strip() == str(setting == "1" and native.CPU.require().matmul_tiles())


def test_no_more_is_saved_than_the_gradients_need() -> None:
    """As torch: what no wanted gradient reads may change, or be freed, before the backward."""
    x, weight = torch.randn(128, 256), torch.randn(256, 256, requires_grad=True)
    y = ops.linear(x, weight)
    with torch.no_grad():
        weight.add_(1)
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(256, 256), rtol=1e-5, atol=1e-4)
    x = torch.randn(128, 256, requires_grad=True)
    y = ops.linear(z := x * 1, weight.detach())
    z.data.zero_()
    with torch.no_grad():
        z.add_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(128, 256), rtol=1e-5, atol=1e-4)
