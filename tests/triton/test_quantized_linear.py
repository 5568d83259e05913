"""The Triton products with quantised weights: every kind, shape and dtype, and faults planted in their source."""

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
from fastlm.nn.embedding import QuantizedEmbedding
from fastlm.nn.linear import QuantizedLinear
from fastlm.reference.quantized import planes

pytest.importorskip("triton.language", reason="triton is not installed")

from fastlm.kernels.triton import quantized_linear as kernel

Run = Callable[[Tensor, ops.QuantizedTensor, Tensor | None], Tensor]


def _triton(input: Tensor, weight: ops.QuantizedTensor, bias: Tensor | None) -> Tensor:
    with ops.backend("triton"):
        return ops.linear(input, weight, bias)


def compare(run: Run, input: Tensor, weight: ops.QuantizedTensor, bias: Tensor | None) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    dense = weight.dequantize().cpu()
    x = input.cpu()
    exact = x.double() @ dense.double().T
    same = x @ dense.to(x.dtype).T
    if bias is not None:
        exact, same = exact + bias.cpu().double(), same + bias.cpu().to(x.dtype)
    # The weights are not rounded to a narrow dtype, so the result's own rounding is all there is to be allowed.
    narrow = exact.to(x.dtype) if x.dtype is not torch.float32 else same
    got = run(input, weight.relaid("planes"), bias)
    assert got.dtype == x.dtype
    assert_close_to_reference(got.cpu(), narrow, exact, floor=2e-6)


def _case(device: str, kind: str, rows: tuple[int, ...], outputs: int, blocks: int, dtype: torch.dtype) -> Any:
    weight = ops.QuantizedTensor.quantize(torch.randn(outputs, 32 * blocks) + 0.3, kind)
    return torch.randn(*rows, 32 * blocks, device=device).to(dtype), weight.to(device)


CASES = pairwise(
    kind=["Q8_0", "Q4_0", "Q4_1"],
    rows=[(), (1, 1), (2,), (3, 7), (70,)],
    outputs=[1, 5, 64, 67],
    blocks=[1, 3, 33],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    bias=[None, "same", "float32"],
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_pair_of_options(device: str, case: dict[str, Any]) -> None:
    bias = case.pop("bias")
    input, weight = _case(device, **case)
    b = None if bias is None else torch.randn(case["outputs"], device=device)
    compare(_triton, input, weight, b.to(case["dtype"]) if bias == "same" and b is not None else b)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_every_code(device: str, kind: str, rows: int) -> None:
    """Bytes as they may be in a file, not only those that our rounding makes."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    data = torch.randint(256, (256, size), dtype=torch.uint8)
    data[:, size - 1] = torch.arange(256)
    data[:, : size % 16] = torch.tensor([0.5, -3.0][: size % 16 // 2], dtype=torch.float16).view(torch.uint8)
    weight = ops.QuantizedTensor(data, kind, (256, 32)).to(device)
    compare(_triton, torch.randn(rows, 32, device=device), weight, None)


def test_infinities_and_nan(device: str) -> None:
    for rows in (1, 3):
        input, weight = _case(device, "Q8_0", (rows,), 8, 2, torch.float32)
        input[0, 3] = torch.inf
        expected = input.cpu() @ weight.dequantize().cpu().T
        torch.testing.assert_close(_triton(input, weight.relaid("planes"), None).cpu(), expected, rtol=1e-4, atol=1e-4)
        input[0, 3] = torch.nan
        assert _triton(input, weight.relaid("planes"), None)[0].isnan().all()


def test_no_rows_and_no_columns(device: str) -> None:
    input, weight = _case(device, "Q8_0", (0,), 8, 2, torch.float32)
    assert _triton(input, weight.relaid("planes"), None).shape == (0, 8)


def test_modules_run_on_planes(device: str) -> None:
    """What `model.to(device)` leaves behind: a head and an embedding over the same re-laid bytes."""
    weight = ops.QuantizedTensor.quantize(torch.randn(40, 64), "Q4_1")
    laid = weight.relaid("planes").to(device)
    ids = torch.tensor([[3, 39], [0, 3]], device=device)
    embedded = QuantizedEmbedding(laid)(ids)
    assert torch.equal(embedded.cpu(), weight.dequantize()[ids.cpu()])
    with ops.backend("triton"):
        got = QuantizedLinear(laid)(embedded)
    torch.testing.assert_close(got.cpu(), embedded.cpu() @ weight.dequantize().T, rtol=1e-5, atol=1e-3)


FAULTS = {
    "nothing": ("", ""),
    "halves swapped": (
        "low, high = _float(both & 15, zero)",
        "high, low = _float(both & 15, zero)",
    ),
    "offset forgotten": ('8 if KIND == "Q4_0"', '0 if KIND == "Q4_0"'),
    "sign forgotten": ("^ 0x80, 128)", ", 0)"),
    "second half of the codes": ("codes + at + 16", "codes + at"),
    "one row: scale of another block": (
        "tl.load(scales + place, mask=mask",
        "tl.load(scales + n[None, :] + 0 * place, mask=mask",
    ),
    "one row: minima forgotten": (
        "acc += total[:, None] * tl.load(minima + place, mask=mask",
        "acc += 0 * total[:, None] * tl.load(minima + place, mask=mask",
    ),
    "one row: last blocks dropped": ("inside = block < last", "inside = block < last - 1"),
    "rows: scale of another block": ("tl.load(scales + place, mask=used", "tl.load(scales + n, mask=used"),
    "rows: minima forgotten": (
        "acc += total[:, None] * tl.load(minima + place, mask=used",
        "acc += 0 * total[:, None] * tl.load(minima + place, mask=used",
    ),
    "rows: last block dropped": ("for block in tl.range(first, last):", "for block in tl.range(first, last - 1):"),
    "rows: last outputs dropped": ("return m, n, m < rows, n < outputs,", "return m, n, m < rows, n < outputs - 1,"),
    "only two parts of the input": ("acc = tl.dot(rest.to(tl.bfloat16), q, acc)", "acc += 0"),
    "input rounded": ("acc = tl.dot(second, q, acc)", "acc += 0"),
    "bias forgotten": ("if BIAS:", "if BIAS and False:"),
    "the high nibble 16 times": ("* 0.0625 - zero", "- zero"),
    "many rows: scale of another block": ("scale = tl.load(scales + place", "scale = tl.load(scales + n"),
    "many rows: one half without its scale": ("low * scale, high * scale", "low * scale, high"),
    "many rows: one half without its minimum": ("low + least, high + least", "low + least, high"),
    "many rows: rows dropped": ("here[None, :] & used[:, None])", "(m < rows - 1)[None, :] & used[:, None])"),
    "many rows: halves of the input swapped": (
        "x_at + block * 32 + 16, mask=here[None",
        "x_at + block * 32, mask=here[None",
    ),
    "parts of k overlap": ("tl.minimum(first + part, blocks)", "blocks"),
    "one row: parts of k overlap by a tile's tail": ("inside = block < last", "inside = block < blocks"),
    "the last part of k dropped": ("(part < parts)[:, None]", "(part < parts - 1)[:, None]"),
    "one row: parts of k in one place": ("output + tl.program_id(1) * outputs + n", "output + n"),
    "rows: parts of k in one place": (", output + tl.program_id(1).to(tl.int64) * rows * outputs", ", output"),
    "bias left to no part of k": (
        "BIAS=bias is not None,\n                PARTS",
        "BIAS=False,\n                PARTS",
    ),
    "bias of another output": ("bias + at % outputs", "bias + at % outputs // 2"),
    "sums of k rounded": ("outputs, dtype=torch.float32)", "outputs, dtype=torch.float16)"),
    "many rows: bias of a row": (
        "acc += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)[:, None]",
        "acc += tl.load(bias + m, mask=m < outputs, other=0.0).to(tl.float32)[None, :]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(device: str, fault: str, tmp_path: Path) -> None:
    copy = mutant(kernel, tmp_path, FAULTS[fault])

    def run(input: Tensor, weight: ops.QuantizedTensor, bias: Tensor | None) -> Tensor:
        return copy.linear(input, *planes(weight.data, weight.kind), bias, weight.kind)

    def check() -> None:
        for kind in ("Q8_0", "Q4_0", "Q4_1"):
            for rows in (1, 3):
                input, weight = _case(device, kind, (rows,), 20, 9, torch.float32)
                # Many terms hide what is lost of each of them: two columns alone show the third part of an input.
                compare(run, input, weight, torch.randn(20, device=device))
                sparse = torch.zeros_like(input)
                sparse[:, 5] = torch.rand(rows) + 1
                compare(run, sparse, weight, None)
            input, weight = _case(device, kind, (70,), 20, 9, torch.float16)
            compare(run, input, weight, torch.randn(20, device=device))
        for rows, blocks in SPLIT:  # Q8_0: less to be lost in, and float32 shows it
            input, weight = _case(device, "Q8_0", (rows,), 7, blocks, torch.float32)
            compare(run, input, weight, torch.randn(7, device=device))

    if fault == "nothing":
        check()
    else:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_hundreds_of_rows(device: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger tile, which a launch takes where there are programs enough for it, beyond its own size."""
    monkeypatch.setattr(kernel, "many_rows_tile", lambda *_: 256)
    compare(_triton, *_case(device, kind, (2, 150), 131, 3, dtype), torch.randn(131, device=device))


SPLIT = [(1, 299), (3, 33)]
"""Rows and blocks of 32 columns whose products are cut into parts of k that end within a tile."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "blocks"), [*SPLIT, (20, 100), (70, 35)])
def test_parts_of_k(device: str, rows: int, blocks: int, dtype: torch.dtype) -> None:
    plan = kernel.Plan.of(rows, 67, blocks, dtype.itemsize, "sm_90")
    assert plan.parts > 1 and plan.part * (plan.parts - 1) < blocks < plan.part * plan.parts
    for kind, bias in (("Q8_0", None), ("Q4_1", torch.randn(67, device=device))):
        compare(_triton, *_case(device, kind, (rows,), 67, blocks, dtype), bias)


def test_when_k_is_cut() -> None:
    def parts(rows: int, outputs: int, columns: int, size: int = 2) -> int:
        return kernel.Plan.of(rows, outputs, columns // 32, size, "sm_90").parts

    assert [parts(8, outputs, 4096) for outputs in (1024, 4096, 16384)] == [8, 4, 2]  # 16 blocks, or 512 programs
    assert [parts(128, outputs, 4096) for outputs in (1024, 4096, 16384)] == [8, 8, 2]
    assert [parts(1, outputs, 14336) for outputs in (64, 1024, 4096)] == [3, 2, 1]
    assert [parts(rows, 192, 576) for rows in (1, 8, 512)] == [1, 1, 1]  # a short k has nothing to share out
    assert parts(2, 16, 1 << 20, 4) == kernel.MOST_PARTS
    for blocks in range(1, 200):  # no part is empty
        plan = kernel.Plan.of(2, 16, blocks, 4, "sm_90")
        assert (plan.parts - 1) * plan.part < blocks <= plan.parts * plan.part


def test_tiles_for_many_rows() -> None:
    tile = kernel.many_rows_tile
    assert [tile(512, 16384, 2, target) for target in ("sm_80", "sm_86", "sm_90", "gfx942")] == [128, 128, 256, 0]
    assert (tile(512, 4096, 2, "sm_90"), tile(64, 16384, 2, "sm_90"), tile(512, 16384, 4, "sm_90")) == (128, 0, 0)
    assert tile(100, 1 << 20, 2, "sm_90") == 128  # a larger one would be half empty


def test_what_the_kernel_leaves_to_others(device: str) -> None:
    def reason(input: Tensor, weight: Any, bias: Tensor | None = None) -> str:
        with ops.backend("triton"):
            return dict(ops.explain("linear", input, weight, bias).reasons)["triton"] or ""

    input, weight = _case(device, "Q8_0", (2,), 8, 2, torch.float32)
    laid = weight.relaid("planes")
    assert "float64" in reason(input.double(), laid)
    assert "a gradient" in reason(input.clone().requires_grad_(), laid)
    assert "lie as in files" in reason(input, weight.relaid("blocks"))
    dense = torch.randn(8, 64, device=device)
    assert "plain floats" in str(ops.explain("linear", input, dense))
    assert reason(input, dense) == ""  # forced, a whole model can run
    assert ops.explain("linear", input, laid).chosen != "cpu"
    torch.testing.assert_close(ops.linear(input, laid), ops.linear(input, weight.relaid("blocks"), compute="exact"))
