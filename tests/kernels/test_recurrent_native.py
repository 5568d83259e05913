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
from fastlm.kernels import native, packing
from fastlm.kernels.cpu import recurrent

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))

CELLS = ("gru", "tanh", "relu")
RAGGED = [7, 7, 5, 2, 2, 1]
NAMES = ("output", "h_n", "input", "h0", "w_ih", "w_hh", "b_ih", "b_hh")
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """One direction of a layer: torch's module, random inputs, and random gradients of the results."""

    def __init__(self, cell: str, inputs: int, hidden: int, sizes: list[int], *, reverse: bool, bias: bool = True):
        self.cell, self.sizes, self.reverse = cell, sizes, reverse
        kwargs = {"bias": bias, "bidirectional": reverse}
        self.module: torch.nn.RNNBase = (
            torch.nn.GRU(inputs, hidden, **kwargs)
            if cell == "gru"
            else torch.nn.RNN(inputs, hidden, nonlinearity=cell, **kwargs)
        ).requires_grad_(False)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        self.names = [name + "_reverse" * reverse for name in names[: 4 if bias else 2]]
        self.weights = [getattr(self.module, name) for name in self.names] + [None] * (4 - len(self.names))
        self.input, self.h0 = torch.randn(sum(sizes), inputs), torch.randn(sizes[0], hidden)
        self.grads = torch.randn(sum(sizes), hidden), torch.randn(sizes[0], hidden)

    def torch(self, dtype: torch.dtype) -> Results:
        """torch's results and gradients."""
        module = copy.deepcopy(self.module).to(dtype).requires_grad_()
        input, h0 = (t.to(dtype).requires_grad_() for t in (self.input, self.h0))
        output, h_n = module(PackedSequence(input, torch.tensor(self.sizes)), torch.stack([h0] * (1 + self.reverse)))
        results = output.data[:, -h0.shape[1] :], h_n[-1]
        weights = [getattr(module, name) for name in self.names]
        found = torch.autograd.grad(results, [input, h0, *weights], [g.to(dtype) for g in self.grads])
        return dict(zip(NAMES, (*(r.detach() for r in results), *found), strict=False))

    def forward(self, rows: slice = slice(None), save: bool = False) -> tuple[Tensor, Tensor, recurrent.Saved | None]:
        """Ours; with `rows`, of those sequences alone (batch sizes all equal)."""
        input, h0, sizes = self.input, self.h0[rows], self.sizes
        if rows != slice(None):
            input = input.view(len(sizes), sizes[0], -1)[:, rows].flatten(0, 1)
            sizes = [len(h0)] * len(sizes)
        return recurrent.layer_forward(self.cell, input, sizes, h0, self.weights, self.reverse, save)

    def native(self) -> Results:
        """Our results and gradients."""
        *results, saved = self.forward(save=True)
        assert saved is not None
        with_biases = (True,) * 4 + (len(self.names) == 4,) * 2
        found = recurrent.layer_backward(saved, *self.grads, with_biases)
        return {name: t for name, t in zip(NAMES, (*results, *found), strict=True) if t is not None}

    def check(self, found: Results) -> None:
        peer, exact = self.torch(torch.float32), self.torch(torch.float64)
        assert found.keys() == exact.keys()
        for name, ours in found.items():
            assert_close_to_reference(ours, peer[name], exact[name], floor=2e-6)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("inputs", "hidden", "sizes"),
    [
        (3, 5, [1]),
        (37, 50, RAGGED),
        (130, 150, [70] * 3),
        (64, 64, [2] * 150),
        (20, 129, [9]),
        (16, 16, RAGGED),
        (70, 90, [20, 17, 16, 9, 3]),
    ],
)
def test_agrees_with_torch(isa: str, cell: str, inputs: int, hidden: int, sizes: list[int], reverse: bool) -> None:
    for bias in (True, False):
        case = Case(cell, inputs, hidden, sizes, reverse=reverse, bias=bias)
        case.check(case.native())


# In digits, up to five rows lie in a tile together, six to sixteen have one for each digit.
@pytest.mark.parametrize(
    ("batch", "parts"), [(7, [(0, 1), (4, 6), (1, 7)]), (21, [(0, 8), (4, 13), (3, 20), (16, 21), (7, 8)])]
)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_depend_on_the_row_alone(isa: str, cell: str, batch: int, parts: list[tuple[int, int]]) -> None:
    case = Case(cell, 140, 200, [batch] * 20, reverse=False)
    whole = case.native()
    output, h_n = whole["output"], whole["h_n"]
    steps = output.view(20, batch, -1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = case.native()
            for name in ("output", "h_n", "h0"):
                assert torch.equal(again[name], whole[name]), (threads, name)
            assert torch.equal(case.forward()[0], output), threads
    finally:
        torch.set_num_threads(before)
    for rows in (slice(*part) for part in parts):
        part, last, _ = case.forward(rows)
        assert torch.equal(part, steps[:, rows].flatten(0, 1))
        assert torch.equal(last, h_n[rows])
    h = case.h0  # the same in pieces, single steps among them
    for low, high in pairwise([0, 1, 2, 9, 20]):
        piece = case.input.view(20, batch, -1)[low:high].flatten(0, 1)
        part, h, _ = recurrent.layer_forward(cell, piece, [batch] * (high - low), h, case.weights, False)
        assert torch.equal(part, steps[low:high].flatten(0, 1))
    assert torch.equal(h, h_n)


@pytest.mark.parametrize("batch", [4, 18])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(isa: str, cell: str, batch: int) -> None:
    case = Case(cell, 8, 24, [batch] * 5, reverse=False)
    clean = case.forward()[0].view(5, batch, -1)
    case.input[2 * batch + 1] = float("nan")  # sequence 1, step 2
    output = case.forward()[0].view(5, batch, -1)
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


def test_is_chosen() -> None:
    for module in (fastlm.nn.GRU(6, 21), fastlm.nn.RNN(6, 21, nonlinearity="relu")):
        name, extra = ("gru", {}) if module.mode == "GRU" else ("rnn", {"nonlinearity": "relu"})
        rest = torch.randn(1, 2, 21), module._flat_weights
        assert ops.explain(name, torch.randn(4, 2, 6), *rest, **extra).chosen == "cpu"
        explanation = ops.explain(name, torch.randn(3, 2, 6), *rest, **extra)
        assert explanation.chosen == "torch"
        assert "fewer than 4 steps" in dict(explanation.reasons)["cpu"]
        with torch.no_grad():
            assert ops.explain(name, torch.randn(3, 2, 6), *rest, **extra).chosen == "cpu"
            assert not module(torch.randn(3, 0, 6))[0].numel()


@pytest.mark.parametrize("cell", CELLS)
def test_partial_needs_and_missing_gradients(isa: str, cell: str) -> None:
    case = Case(cell, 12, 35, RAGGED, reverse=True)
    saved = case.forward(save=True)[-1]
    assert saved is not None
    for present in range(2):
        grads = [g if i == present else None for i, g in enumerate(case.grads)]
        filled = [g if i == present else torch.zeros_like(g) for i, g in enumerate(case.grads)]
        whole = recurrent.layer_backward(saved, *filled)
        for needs in ((True,) * 6, (False, True, True, False, False, True)):
            for found, want, needed in zip(recurrent.layer_backward(saved, *grads, needs), whole, needs, strict=True):
                assert (found is not None) == needed
                assert found is None or torch.equal(found, want)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_arguments(isa: str, cell: str) -> None:
    case = Case(cell, 12, 20, [3] * 4, reverse=False)
    expected = case.native()
    case.input, case.h0 = (t.t().contiguous().t() for t in (case.input, case.h0))
    case.grads = case.grads[0].t().contiguous().t(), case.grads[1]
    case.weights = [torch.stack([w] * 2, -1)[..., 0] for w in case.weights]
    found = case.native()
    for name in NAMES:
        if name in ("output", "h_n", "h0"):
            assert torch.equal(found[name], expected[name]), name
        else:  # of torch's products, whose order of summation is torch's own
            torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_defaults_of_dtype_and_device_do_not_matter(cell: str) -> None:
    case = Case(cell, 12, 35, RAGGED, reverse=False)
    expected = case.native()
    packing.clear()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = case.native()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_refuses_a_second_derivative() -> None:
    for name, module in (("gru", fastlm.nn.GRU(6, 21)), ("rnn", fastlm.nn.RNN(6, 21))):
        output, _ = module(torch.randn(4, 2, 6))
        with pytest.raises(RuntimeError, match=f"^{name}: the native kernel has no second derivative"):
            torch.autograd.grad(output.sum(), module.weight_ih_l0, create_graph=True)


# Tests of the tests: what a faulty kernel would give, as seen by the comparison used above.
def _swap(case: Case) -> None:
    for weight in case.weights[:2]:  # r and z
        weight.copy_(torch.cat([weight.chunk(3)[i] for i in (1, 0, 2)]))


@pytest.mark.parametrize("cell", CELLS)
def test_a_fault_is_noticed(cell: str) -> None:
    case = Case(cell, 11, 18, RAGGED, reverse=False)
    good = case.native()
    case.check(good)
    faults = [{**good, name: torch.zeros_like(good[name])} for name in NAMES]
    faults += [{**good, name: good[name].roll(1, 0)} for name in NAMES]
    if cell == "gru":
        _swap(case)
        faults.append(case.native())
        _swap(case)
        weights, (w_ih, w_hh, b_ih, b_hh) = case.weights, case.weights
        case.weights = [w_ih, w_hh, b_ih + b_hh, torch.zeros_like(b_hh)]  # n's two biases as one
        faults.append(case.native())
        case.weights = weights
        faults.append({**good, "b_hh": good["b_ih"]})  # r forgotten
    grads = case.grads
    case.grads = grads[0], torch.zeros_like(grads[1])  # the last state's gradient forgotten
    faults.append(case.native())
    case.grads = grads
    for fault in faults:
        with pytest.raises(AssertionError):
            case.check(fault)
