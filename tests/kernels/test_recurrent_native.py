"""The native GRU and plain RNN against torch's, judged by float64; and bits that depend on nothing but the row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastlm
from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import recurrent

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))

CELLS = ("gru", "tanh", "relu")
RAGGED = [7, 7, 5, 2, 2, 1]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """One direction of a layer: torch's module, and random inputs."""

    def __init__(self, cell: str, inputs: int, hidden: int, sizes: list[int], *, reverse: bool, bias: bool = True):
        self.cell, self.sizes, self.reverse = cell, sizes, reverse
        kwargs = {"bias": bias, "bidirectional": reverse}
        self.module: torch.nn.RNNBase = (
            torch.nn.GRU(inputs, hidden, **kwargs)
            if cell == "gru"
            else torch.nn.RNN(inputs, hidden, nonlinearity=cell, **kwargs)
        ).requires_grad_(False)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        self.weights = [getattr(self.module, name + "_reverse" * reverse, None) for name in names]
        self.input, self.h0 = torch.randn(sum(sizes), inputs), torch.randn(sizes[0], hidden)

    def torch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(self.module).to(dtype)
        h0 = torch.stack([self.h0.to(dtype)] * (1 + self.reverse))
        output, h_n = module(PackedSequence(self.input.to(dtype), torch.tensor(self.sizes)), h0)
        return output.data[:, -self.h0.shape[1] :], h_n[-1]

    def native(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Ours; with `rows`, of those sequences alone (batch sizes all equal)."""
        if rows == slice(None):
            return recurrent.layer_forward(self.cell, self.input, self.sizes, self.h0, self.weights, self.reverse)
        input = self.input.view(len(self.sizes), self.sizes[0], -1)[:, rows].flatten(0, 1)
        h0 = self.h0[rows]
        return recurrent.layer_forward(self.cell, input, [len(h0)] * len(self.sizes), h0, self.weights, self.reverse)

    def check(self, found: tuple[Tensor, Tensor]) -> None:
        for ours, peer, exact in zip(found, self.torch(torch.float32), self.torch(torch.float64), strict=True):
            assert_close_to_reference(ours, peer, exact, floor=2e-6)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("inputs", "hidden", "sizes"),
    [(3, 5, [1]), (37, 50, RAGGED), (130, 150, [70] * 3), (64, 64, [2] * 150), (20, 129, [9]), (16, 16, RAGGED)],
)
def test_agrees_with_torch(isa: str, cell: str, inputs: int, hidden: int, sizes: list[int], reverse: bool) -> None:
    for bias in (True, False):
        case = Case(cell, inputs, hidden, sizes, reverse=reverse, bias=bias)
        case.check(case.native())


@pytest.mark.parametrize("cell", CELLS)
def test_bits_depend_on_the_row_alone(isa: str, cell: str) -> None:
    case = Case(cell, 140, 200, [13] * 20, reverse=False)
    output, h_n = case.native()
    steps = output.view(20, 13, -1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(case.native()[0], output), threads
    finally:
        torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(4, 6), slice(5, 12)):
        part, last = case.native(rows)
        assert torch.equal(part, steps[:, rows].flatten(0, 1))
        assert torch.equal(last, h_n[rows])
    h = case.h0  # the same in pieces, single steps among them
    for low, high in pairwise([0, 1, 2, 9, 20]):
        piece = case.input.view(20, 13, -1)[low:high].flatten(0, 1)
        part, h = recurrent.layer_forward(cell, piece, [13] * (high - low), h, case.weights, False)
        assert torch.equal(part, steps[low:high].flatten(0, 1))
    assert torch.equal(h, h_n)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(isa: str, cell: str) -> None:
    case = Case(cell, 8, 24, [4] * 5, reverse=False)
    clean = case.native()[0].view(5, 4, -1)
    case.input[9] = float("nan")  # sequence 1, step 2
    output = case.native()[0].view(5, 4, -1)
    assert output[2:, 1].isnan().all()
    output[2:, 1] = clean[2:, 1]
    assert torch.equal(output, clean)


@pytest.mark.parametrize("cell", CELLS)
def test_reads_changed_weights(cell: str) -> None:
    case = Case(cell, 8, 24, [4] * 5, reverse=False)
    case.native()
    for weight in case.weights:
        weight.mul_(-0.5)
        case.check(case.native())


def test_is_chosen_where_no_gradient_is_wanted() -> None:
    for module in (fastlm.nn.GRU(6, 21), fastlm.nn.RNN(6, 21, nonlinearity="relu")):
        name, extra = ("gru", {}) if module.mode == "GRU" else ("rnn", {"nonlinearity": "relu"})
        arguments = torch.randn(3, 2, 6), torch.randn(1, 2, 21), module._flat_weights
        assert ops.explain(name, *arguments, **extra).chosen == "torch"
        with torch.no_grad():
            assert ops.explain(name, *arguments, **extra).chosen == "cpu"
            assert not module(torch.randn(3, 0, 6))[0].numel()
        with ops.backend("cpu"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
            module(arguments[0])


# Tests of the tests: what a faulty kernel would give, as seen by the comparison used above.
@pytest.mark.parametrize("cell", CELLS)
def test_a_fault_is_noticed(cell: str) -> None:
    case = Case(cell, 11, 18, RAGGED, reverse=False)
    output, h_n = case.native()
    faults = [(torch.zeros_like(output), h_n), (output.roll(1, 0), h_n), (output, h_n.roll(1, 0))]
    if cell == "gru":
        for weight in case.weights[:2]:  # r and z swapped
            weight.copy_(torch.cat([weight.chunk(3)[i] for i in (1, 0, 2)]))
        faults.append(case.native())
        for weight in case.weights[:2]:
            weight.copy_(torch.cat([weight.chunk(3)[i] for i in (1, 0, 2)]))
        w_ih, w_hh, b_ih, b_hh = case.weights  # n's two biases as one
        merged = [w_ih, w_hh, b_ih + b_hh, torch.zeros_like(b_hh)]
        faults.append(recurrent.layer_forward(cell, case.input, RAGGED, case.h0, merged, False))
    for fault in faults:
        with pytest.raises(AssertionError):
            case.check(fault)
