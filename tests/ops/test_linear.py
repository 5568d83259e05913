"""The native products against float64, at every instruction-set level, and the choice between the ways to compute."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import ops
from fastlm.kernels import native
from fastlm.ops import QuantizedTensor
from fastlm.reference import linear as reference
from fastlm.reference.quantized import KINDS

module = importlib.import_module("fastlm.ops.linear")  # fastlm.ops.linear is the function

ALL = list(KINDS)
INTEGER = ["Q8_0", "Q4_0", "Q4_1"]
FLOAT = ["F32", "F16", "BF16"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty is full of NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(kind: str, outputs: int, columns: int) -> QuantizedTensor:
    return QuantizedTensor.quantize(torch.randn(outputs, columns), kind)


def by_cpu(x: Tensor, weight: QuantizedTensor | Tensor, bias: Tensor | None = None, compute: str = "fast") -> Tensor:
    with ops.backend("cpu"):
        return ops.linear(x, weight, bias, compute=compute)


def check(y: Tensor, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, compute: str) -> None:
    """The comparison of this file: within the design's bound of the same scheme in float64."""
    if x.dim() > 2 and native.CPU.require().matmul_tiles():
        x, y = x.flatten(0, -2), y.flatten(0, -2)  # 15 bits, as for a row by itself, are kept of prompts too
    ref64 = reference.quantized_linear(
        x.double(), weight.data, weight.kind, None if bias is None else bias.double(), compute
    )
    same = reference.quantized_linear(x, weight.data, weight.kind, bias, compute)
    assert_close_to_reference(y, same, ref64)


@pytest.mark.parametrize("compute", ["exact", "fast"])
@pytest.mark.parametrize("kind", ALL)
def test_native_is_as_near_as_float32_allows(isa: str, kind: str, compute: str) -> None:
    for outputs, columns in ((1, 32), (7, 96), (33, 64), (16, 576), (65, 352)):
        weight, bias = weight_of(kind, outputs, columns), torch.randn(outputs)
        for rows in (*range(1, 10), 17, 64):  # beyond 16, those of one sequence are rounded to 8 bits instead of 15
            b = bias if rows % 2 else None
            for x in (torch.randn(rows, columns), torch.randn(1, rows, columns)):
                check(by_cpu(x, weight, b, compute), x, weight, b, compute)


@pytest.mark.parametrize("kind", FLOAT)
def test_plain_floats_have_any_number_of_columns(isa: str, kind: str) -> None:
    for columns in (1, 3, 31, 33, 47, 100):
        weight, x = weight_of(kind, 9, columns), torch.randn(5, columns)
        check(by_cpu(x, weight), x, weight, None, "exact")
        dtype = KINDS[kind].dtype
        assert torch.equal(by_cpu(x, weight.data.view(dtype)), by_cpu(x, weight))


@pytest.mark.parametrize("kind", INTEGER)
def test_rounding_the_input_costs_at_most_half_a_step(isa: str, kind: str) -> None:
    weight, x = weight_of(kind, 40, 256), torch.randn(1, 3, 256) * torch.rand(1, 3, 256).exp()
    dense = weight.dequantize().double()
    for bits, input in ((15, x), (8, x.repeat(1, 9, 1))):
        assert reference.rounding_bits(input.shape) == bits
        kept = 15 if native.CPU.require().matmul_tiles() else bits
        codes, scales = reference.quantize_activations(input, kept)
        step = scales.double().expand(codes.shape).flatten(-2)
        floor = 1e-6 * input.abs().double() @ dense.abs().T  # float32 sums
        error = (by_cpu(input, weight).double() - input.double() @ dense.T).abs()
        assert (error <= 0.501 * step @ dense.abs().T + floor).all()
        assert error.max() > 0.01 * (step @ dense.abs().T).min()  # it was integer arithmetic


@pytest.mark.parametrize("compute", ["exact", "fast"])
@pytest.mark.parametrize("kind", ALL)
def test_neither_batch_nor_threads_change_a_bit(isa: str, kind: str, compute: str) -> None:
    # 800 x 320 is beyond the size at which three threads are used, for every kind.
    weight, bias = weight_of(kind, 800, 320), torch.randn(800)
    before = torch.get_num_threads()
    try:
        for x in (torch.randn(11, 320), torch.randn(11, 1, 320), torch.randn(3, 17, 320)):
            torch.set_num_threads(before)
            alone = torch.cat([by_cpu(row, weight, bias, compute) for row in x.split(1)])
            for threads, rows in itertools.product((1, 2, 3), (2, 3, 5, 11)):
                torch.set_num_threads(threads)
                together = torch.cat([by_cpu(part, weight, bias, compute) for part in x.split(rows)])
                assert torch.equal(together, alone), f"{threads} threads, {rows} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_a_group_gives_what_its_members_give(isa: str, compute: str, tokens: int) -> None:
    x = torch.randn(2, tokens, 64)
    weights = [weight_of("Q4_1", 33, 64), torch.randn(7, 64), weight_of("Q8_0", 1, 64), weight_of("F16", 20, 64)]
    biases = [torch.randn(33), None, None, torch.randn(20).double()]
    expected = [ops.linear(x, w, b, compute=compute) for w, b in zip(weights, biases, strict=True)]
    for size in (1, 2, 3, 4):
        found = ops.linear_group(x, weights[:size], biases[:size], compute=compute)
        assert len(found) == size and all(map(torch.equal, found, expected))
    many = ops.linear_group(x, weights[:1] * 5, biases[:1] * 5, compute=compute)
    assert len(many) == 5 and all(torch.equal(y, expected[0]) for y in many)
    with torch.no_grad(), ops.backend("reference"):
        for y, w, b in zip(ops.linear_group(x, weights, biases, compute=compute), weights, biases, strict=True):
            assert torch.equal(y, ops.linear(x, w, b, compute=compute))
    with pytest.raises(ValueError, match=r"bias is float32 \[3\]"):
        ops.linear_group(x, weights[:2], [None, torch.randn(3)])


def test_a_group_has_gradients() -> None:
    x, weights = torch.randn(2, 8, requires_grad=True), [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    found = torch.autograd.grad(sum(y.sum() for y in ops.linear_group(x, weights, [None, None])), (x, *weights))
    expected = torch.autograd.grad(sum((x @ w.T).sum() for w in weights), (x, *weights))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_interleaved_weights_are_made_once_and_counted(isa: str) -> None:
    weight, x = weight_of("Q4_0", 33, 64), torch.randn(1, 64)
    assert weight.nbytes == weight.data.numel()
    by_cpu(x, weight)
    address, size = weight.interleaved().data_ptr(), weight.nbytes - weight.data.numel()
    assert address % 64 == 0 and weight.data.numel() < size < 2 * weight.data.numel()
    again = QuantizedTensor(weight.data, "Q4_0", (33, 64))  # other wrapping, the same bytes
    by_cpu(x, again)
    assert again.interleaved().data_ptr() == address and weight.nbytes == weight.data.numel() + size


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(ALL),
    batch=st.lists(st.integers(0, 3), max_size=3),
    outputs=st.integers(0, 40),
    blocks=st.integers(0, 5),
    compute=st.sampled_from(["fast", "exact"]),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]),
)
def test_any_shape_and_strides(
    isa: str, kind: str, batch: list[int], outputs: int, blocks: int, compute: str, layout: str
) -> None:
    columns = 32 * blocks
    weight = weight_of(kind, outputs, columns)
    x = torch.randn(*batch, columns)
    if layout == "sliced":
        x = torch.randn(*batch, columns + 3)[..., 2 : 2 + columns]
    elif layout == "transposed" and batch:
        x = torch.randn(columns, *batch).movedim(0, -1)
    elif layout == "expanded" and batch:
        x = x[:1].expand(batch[0] and 2, *batch[1:], columns)
    y = by_cpu(x, weight, None, compute)
    assert y.shape == (*x.shape[:-1], outputs)
    check(y, x.contiguous(), weight, None, compute)


def blocks_of(kind: str, scale: float, minimum: float, codes: int) -> bytes:
    """One block whose 32 codes are all `codes` (a byte; for Q4 its two halves)."""
    half = torch.tensor([scale, minimum][: 2 if kind == "Q4_1" else 1]).half().view(torch.uint8)
    return bytes([*half.tolist(), *[codes] * (32 if kind == "Q8_0" else 16)])


@pytest.mark.parametrize("kind", INTEGER)
@pytest.mark.parametrize("codes", [0x00, 0x0F, 0xF0, 0xFF, 0x80, 0x7F])
@pytest.mark.parametrize("scale", [0.0, 2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.0, 65504.0], ids=lambda s: f"scale{s:.3g}")
def test_extreme_blocks(isa: str, kind: str, codes: int, scale: float) -> None:
    # All products at their largest and of one sign: what saturating or narrow sums would get wrong.
    data = torch.tensor(list(blocks_of(kind, scale, -3 * scale if scale < 1000 else 1.0, codes) * 4), dtype=torch.uint8)
    weight = QuantizedTensor(data.repeat(5, 1), kind, (5, 128))
    for sign in (1, -1):
        x = torch.full((2, 128), 1.5 * sign)
        for compute in ("exact", "fast"):
            check(by_cpu(x, weight, None, compute), x, weight, None, compute)


@pytest.mark.parametrize("kind", INTEGER)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-31, 1e-29, 1e-10, 1e30], ids=str)
def test_tiny_and_huge_inputs(isa: str, kind: str, scale: float) -> None:
    weight, x = weight_of(kind, 20, 96), torch.randn(2, 96) * scale
    x[1, :32] = 1  # another block of the same row is not drowned by it
    expected = reference.quantized_linear(x.double(), weight.data, kind, None, "fast")
    torch.testing.assert_close(by_cpu(x, weight).double(), expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("compute", ["exact", "fast"])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_so_and_in_its_place(isa: str, kind: str, value: float, compute: str) -> None:
    weight, x = weight_of(kind, 33, 96), torch.randn(6, 96)
    clean = by_cpu(x, weight, None, compute)
    x[4, 50] = value
    y = by_cpu(x, weight, None, compute)
    assert not y[4].isfinite().any()
    others = [0, 1, 2, 3, 5]
    assert torch.equal(y[others], clean[others])

    x[4, 50] = 1
    block = 32 // KINDS[kind].block
    start = 17 * weight.row_bytes + block * KINDS[kind].block_bytes  # a scale (or, of plain floats, a weight) of row 17
    width = 4 if kind == "F32" else 2
    dtype = KINDS[kind].dtype or torch.float16
    data = weight.data.clone()
    data.view(-1)[start : start + width] = torch.tensor([value]).to(dtype).view(torch.uint8)
    weight = QuantizedTensor(data, kind, (33, 96))
    y = by_cpu(x, weight, None, compute)
    assert not y[:, 17].isfinite().any()
    others = [n for n in range(33) if n != 17]
    assert torch.equal(y[others[0] : 4, others], by_cpu(x, weight, None, compute)[others[0] : 4, others])
    assert y[:, others].isfinite().all()


@pytest.mark.parametrize("compute", ["exact", "fast"])
@pytest.mark.parametrize("kind", INTEGER)
def test_planted_faults_fail_the_comparison(kind: str, compute: str) -> None:
    weight, x = weight_of(kind, 33, 96), torch.randn(3, 96)
    check(by_cpu(x, weight, None, compute), x, weight, None, compute)
    header = KINDS[kind].block_bytes - (32 if kind == "Q8_0" else 16)

    def changed(fault: str) -> QuantizedTensor:
        blocks = weight.data.clone().view(33, 3, -1)
        codes = blocks[..., header:]
        if fault == "nibbles swapped":
            codes.copy_((codes >> 4) | (codes << 4))
        elif fault == "last block dropped":
            blocks[:, -1] = 0
        elif fault == "minimum dropped":
            blocks[..., 2:4] = 0
        elif fault == "scale of the next row":
            blocks[..., :2] = blocks[..., :2].roll(1, 0)
        elif fault == "one code off by one":
            codes[0, 0, 5] ^= 1
        return QuantizedTensor(blocks.view(33, -1), kind, (33, 96))

    faults = ["nibbles swapped", "last block dropped", "scale of the next row", "one code off by one"]
    for fault in [*faults, "minimum dropped"] if kind == "Q4_1" else faults:
        with pytest.raises(AssertionError):
            check(by_cpu(x, changed(fault), None, compute), x, weight, None, compute)
            pytest.fail(f"{fault} went unseen")  # not an AssertionError
    with pytest.raises(AssertionError):
        check(torch.zeros(3, 33), x, weight, None, compute)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_go_through_a_matrix_product(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPANDED", 64 * 10)  # several expansions, the last one shorter
    rows = module.FEW_ROWS + 5
    weight, x, bias = weight_of(kind, 33, 64), torch.randn(2, rows, 64).to(dtype), torch.randn(33)
    y = ops.linear(x, weight, bias, compute="exact")
    assert y.dtype == dtype and y.shape == (2, rows, 33)
    assert ops.explain("linear", x, weight, bias, compute="exact").chosen == "torch"
    same = reference.quantized_linear(x, weight.data, kind, bias, "exact")
    ref64 = reference.quantized_linear(x.double(), weight.data, kind, bias, "exact")
    assert_close_to_reference(y, same, ref64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_inputs(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(33, 47).to(dtype), torch.randn(33)
    for rows, emulated in itertools.product((3, 40), (True, False)):
        monkeypatch.setattr(module, "_emulated", lambda _, emulated=emulated: emulated)
        x = torch.randn(rows, 47)
        for input in (x, x.to(dtype)):
            b = bias.to(input.dtype)
            y = ops.linear(input, weight, b)
            ref64 = torch.nn.functional.linear(input.double(), weight.double(), b.double())
            same = torch.nn.functional.linear(input.float(), weight.float(), b.float()).to(input.dtype)
            assert y.dtype == input.dtype
            assert_close_to_reference(y, same, ref64, floor=1e-6 if input.dtype == torch.float32 else 1e-3)


def test_the_choice_is_explained() -> None:
    weight = weight_of("Q4_1", 8, 64)

    def chosen(x: Tensor, w: Tensor | QuantizedTensor = weight) -> str | None:
        return ops.explain("linear", x, w).chosen

    few, many = torch.randn(module.FEW_ROWS, 64), torch.randn(module.FEW_ROWS + 1, 64)
    assert chosen(few) == "cpu" and chosen(many) == "cpu"
    assert ops.explain("linear", few, weight, compute="exact").chosen == "cpu"
    assert ops.explain("linear", many, weight, compute="exact").chosen == "torch"
    assert ops.explain("linear", many[None], weight, compute="exact").chosen == "cpu"  # a few tokens of one sequence
    assert ops.explain("linear", many[None].repeat(1, 2, 1), weight, compute="exact").chosen == "torch"
    assert "a matrix product is quicker beyond" in str(ops.explain("linear", many, weight, compute="exact"))
    assert chosen(few.requires_grad_()) == "reference"
    assert chosen(few.detach().double()) == "reference"
    dense = torch.randn(8, 64, requires_grad=True)
    assert chosen(few, dense) == "torch" and chosen(few, dense.bfloat16()) == "reference"
    with torch.no_grad():
        assert chosen(few, dense) == "cpu" and chosen(many, dense) == "torch"
        assert chosen(few, torch.randn(64, 8).T) == "torch"  # not contiguous
    with ops.backend("cpu"):
        assert chosen(many) == "cpu"
        with pytest.raises(NotImplementedError, match="a gradient is wanted"):
            ops.linear(torch.randn(1, 64, requires_grad=True), weight)


def test_torchs_defaults_do_not_matter() -> None:
    weight, x = weight_of("Q4_1", 9, 64), torch.randn(3, 64)
    expected = ops.linear(x, weight), weight.rows(torch.tensor([3])), weight.dequantize()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        ids = torch.tensor([3], device="cpu")
        found = ops.linear(x, weight), weight.rows(ids), weight.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of("Q4_0", 9, 64), torch.randn(3, 64)
    expected = by_cpu(x, weight, None, "exact")
    rows = weight.rows(torch.tensor([8, 0]))
    monkeypatch.setattr(native.CPU, "module", None)
    monkeypatch.setattr(native.CPU, "error", "was not built")
    assert ops.explain("linear", x, weight).reasons[0] == ("cpu", "was not built")
    torch.testing.assert_close(ops.linear(x, weight, compute="exact"), expected)
    assert torch.equal(weight.rows(torch.tensor([8, 0])), rows)
    with pytest.raises(IndexError, match="id 9"):
        weight.rows(torch.tensor([9]))


def test_reference_of_dense_weights_is_torchs_linear() -> None:
    x, weight, bias = torch.randn(3, 5, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double()
    torch.testing.assert_close(reference.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("kind", ALL)
def test_gradients(kind: str) -> None:
    weight = weight_of(kind, 5, 32)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear(x, weight, b, compute="exact"), (x, bias))
    # The rounding of "fast" is passed straight through.
    grad = torch.randn(3, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(ops.linear(x, weight, bias, compute="fast"), x, grad)
    torch.testing.assert_close(found, grad @ weight.dequantize().double())


def test_gradients_of_a_dense_weight() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    for w in (weight, weight.bfloat16()):
        found = torch.autograd.grad(ops.linear(x, w).sum(), (x, weight))
        expected = torch.autograd.grad((x @ w.float().T).sum(), (x, weight))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    cases = ((False, "Q4_1", "fast", "blocks"), (True, "Q8_0", "exact", "blocks"), (False, "Q4_1", "exact", "planes"))
    for grad, kind, compute, layout in cases:
        x, bias = torch.randn(2, 64, requires_grad=grad), torch.randn(9, requires_grad=grad)
        data = weight_of(kind, 9, 64).relaid(layout).data
        torch.library.opcheck(module._quantized_linear, (x, data, kind, 64, layout, bias, compute))
        torch.library.opcheck(module._linear, (x, torch.randn(9, 64, requires_grad=grad), None))


def test_compiles_without_a_graph_break() -> None:
    weight, dense, x = weight_of("Q8_0", 9, 64), torch.randn(9, 64), torch.randn(2, 64)
    compiled = torch.compile(lambda x: ops.linear(x, weight) + ops.linear(x, dense), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.linear(x, weight) + ops.linear(x, dense))


def test_bad_arguments_are_named() -> None:
    weight = weight_of("Q4_1", 8, 64)
    with pytest.raises(ValueError, match=r"input is float32 \[2, 32\] on cpu, expected floats \[\.\.\., 64\]"):
        ops.linear(torch.randn(2, 32), weight)
    with pytest.raises(ValueError, match="input is int64"):
        ops.linear(torch.ones(2, 64, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"bias is float32 \[7\].*expected shape \[8\]"):
        ops.linear(torch.randn(2, 64), weight, torch.randn(7))
    with pytest.raises(ValueError, match="compute is 'quick'"):
        ops.linear(torch.randn(2, 64), weight, compute="quick")
    with pytest.raises(ValueError, match=r"weight is \[64\]"):
        ops.linear(torch.randn(2, 64), torch.randn(64))


def test_a_float_weight_of_a_file_may_lie_anywhere() -> None:
    values, x = torch.randn(256, 256), torch.randn(1, 256)
    data = torch.empty(256 * 256 * 4 + 2, dtype=torch.uint8)
    data[2:] = values.view(torch.uint8).flatten()
    weight = QuantizedTensor(data[2:].view(256, -1), "F32", (256, 256))
    torch.testing.assert_close(ops.linear(x, weight), ops.linear(x, values), rtol=1e-5, atol=1e-4)


def test_fake_tensors_are_left_to_torch() -> None:
    """Outside their mode too: they have no memory for a kernel to read."""
    fake = FakeTensorMode().from_tensor(torch.randn(2, 50))
    with torch.no_grad(), pytest.raises(AssertionError, match="FakeTensor"):
        ops.linear(fake, torch.ones(50, 50))
