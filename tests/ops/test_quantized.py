"""Byte for byte with the `gguf` library, from memory that cannot be written."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm.ops import QuantizedTensor
from fastlm.reference.quantized import KINDS

ALL = list(KINDS)
BLOCKS = [name for name in ALL if KINDS[name].block > 1]


def random_bytes(kind: str, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 256, (rows, KINDS[kind].row_bytes(columns)), dtype=torch.uint8)


def by_gguf(weight: QuantizedTensor) -> Tensor:
    array = gguf.quants.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[weight.kind])
    return torch.from_numpy(np.ascontiguousarray(array)).float()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for the payload of a NaN."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(torch.int32) == b.view(torch.int32))).all())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy, on the random scales
def test_dequantize_every_bit_pattern_as_gguf_does(kind: str) -> None:
    # Random bytes: scales are zero, denormal, infinite and NaN too.
    weight = QuantizedTensor(random_bytes(kind, 257, 320), kind, (257, 320))
    expected = by_gguf(weight)
    assert same_bits(weight.dequantize(), expected)
    ids = torch.tensor([[0, 256], [7, 7]])
    assert same_bits(weight.rows(ids), expected[ids])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy, on 1 / 0
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    scale=st.sampled_from([1e-42, 1e-8, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_quantize_writes_the_bytes_of_gguf(kind: str, rows: int, blocks: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, 32 * blocks, generator=generator) * scale
    weights[0, :32] = 0
    weights[-1, -32:] = weights[-1, -1]  # one value
    weights[-1, :32] = torch.arange(-16, 16) * scale  # halves and ties of the largest magnitude
    expected = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8)
    weight = QuantizedTensor.quantize(weights, kind)
    assert torch.equal(weight.data, torch.from_numpy(expected))
    assert weight.shape == weights.shape and weight.nbytes == expected.size


@pytest.mark.parametrize(
    ("kind", "bound"), [("F32", 0.0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.005), ("Q4_0", 0.13), ("Q4_1", 0.07)]
)
def test_quantize_loses_no_more_than_its_step(kind: str, bound: float) -> None:
    weights = torch.rand(16, 64) * 2 - 1
    error = (QuantizedTensor.quantize(weights, kind).dequantize() - weights).abs().max()
    assert error <= bound


@pytest.mark.parametrize("kind", BLOCKS)
def test_planted_faults_are_seen(kind: str) -> None:
    weight = QuantizedTensor.quantize(torch.randn(4, 64), kind)
    expected = by_gguf(weight)
    header = 4 if kind == "Q4_1" else 2
    swapped, shifted = weight.data.clone(), weight.data.clone()
    blocks = swapped.view(4, 2, -1)[..., header:]
    blocks.copy_((blocks >> 4) | (blocks << 4))
    shifted.view(4, 2, -1)[..., :header] = shifted.view(4, 2, -1)[..., :header].roll(1, -1)
    for fault in (swapped, shifted, torch.zeros_like(swapped)):
        assert not same_bits(QuantizedTensor(fault, kind, (4, 64)).dequantize(), expected)


@pytest.mark.parametrize("kind", ALL)
def test_a_read_only_memory_map_is_wrapped_in_place(kind: str, tmp_path: Path) -> None:
    stored = QuantizedTensor.quantize(torch.randn(5, 96), kind)
    path = tmp_path / "weight"
    path.write_bytes(bytes(32) + stored.data.numpy().tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = QuantizedTensor.from_numpy(mapped, kind, (5, 96))
    assert weight.data.data_ptr() == mapped.ctypes.data
    assert torch.equal(weight.data, stored.data)
    dense = weight.dequantize()
    dense.zero_()  # must be memory of its own: writing to the map would end the process
    assert torch.equal(weight.dequantize(), stored.dequantize())


def test_copies_and_pickles() -> None:
    weight = QuantizedTensor.quantize(torch.randn(4, 64), "Q4_1")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert other.kind == weight.kind and other.shape == weight.shape
        assert torch.equal(other.data, weight.data) and other.data.data_ptr() != weight.data.data_ptr()
    assert weight.to("cpu") is weight
    assert weight.to_gguf_kind is gguf.GGMLQuantizationType.Q4_1
    assert weight.requires_grad is False
    assert weight.dequantize(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "kind", "shape", "message"),
    [
        (torch.zeros(2, 20, dtype=torch.uint8), "Q5_K", (2, 32), "kind is 'Q5_K', expected one of F32"),
        (torch.zeros(2, 20, dtype=torch.uint8), "Q4_1", (2, 33), "33 columns are not a multiple"),
        (torch.zeros(2, 20, dtype=torch.uint8), "Q4_1", (3, 32), r"data is uint8 \[2, 20\].*expected.*\[3, 20\]"),
        (torch.zeros(2, 18, dtype=torch.uint8), "Q4_1", (2, 32), r"expected contiguous uint8 \[2, 20\]"),
        (torch.zeros(2, 20, dtype=torch.int8), "Q4_1", (2, 32), "data is int8"),
        (torch.zeros(20, 2, dtype=torch.uint8).T, "Q4_1", (2, 32), "not contiguous"),
        (torch.zeros(2, 20, dtype=torch.uint8), "Q4_1", (64,), "expected .rows, columns."),
    ],
)
def test_misfits_are_named(data: Tensor, kind: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(data, kind, shape)


def test_rows_and_quantize_refuse_what_they_cannot_do() -> None:
    weight = QuantizedTensor.quantize(torch.randn(4, 64), "Q8_0")
    for ids, bad in ((torch.tensor([0, 4]), "4"), (torch.tensor([-1, 2]), "-1")):
        with pytest.raises(IndexError, match=rf"id {bad} is not in \[0, 4\)"):
            weight.rows(ids)
    with pytest.raises(ValueError, match="expected integers"):
        weight.rows(torch.tensor([1.0]))
    assert weight.rows(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 64)
    assert torch.equal(weight.rows(torch.tensor(2, dtype=torch.int32)), weight.dequantize()[2])
    with pytest.raises(ValueError, match="33 columns"):
        QuantizedTensor.quantize(torch.randn(2, 33), "Q4_0")
    with pytest.raises(ValueError, match="expected floats"):
        QuantizedTensor.quantize(torch.ones(2, 32, dtype=torch.int64), "Q4_0")
    with pytest.raises(ValueError, match="'q4'"):
        QuantizedTensor.quantize(torch.randn(2, 32), "q4")


@pytest.mark.parametrize("kind", BLOCKS)
def test_planes_hold_the_same_weight(kind: str) -> None:
    weight = QuantizedTensor(random_bytes(kind, 5, 96), kind, (5, 96))
    laid = weight.relaid("planes")
    assert laid.nbytes == weight.nbytes
    assert not torch.equal(laid.data, weight.data)
    assert torch.equal(laid.relaid("blocks").data, weight.data)
    assert same_bits(laid.dequantize(), weight.dequantize())
    assert same_bits(laid.expand_rows(1, 3), weight.expand_rows(1, 3))
    ids = torch.tensor([[4, 0, 4]])
    assert same_bits(laid.rows(ids), weight.rows(ids))
    with pytest.raises(IndexError, match="id 5 is not in"):
        laid.rows(torch.tensor([5]))
    again = pickle.loads(pickle.dumps(laid))
    assert again.layout == "planes"
    assert weight.to("meta").layout == "planes"
    assert laid.to("cpu") is laid


def test_planes_are_for_blocks() -> None:
    with pytest.raises(ValueError, match="layout is 'planes', expected 'blocks'"):
        QuantizedTensor(torch.zeros(2, 8, dtype=torch.uint8), "F32", (2, 2), "planes")
