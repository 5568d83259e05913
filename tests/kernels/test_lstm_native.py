"""The native LSTM against torch's, judged by a float64 LSTM; and what it promises beyond: bits that depend on nothing
but the row."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlm.kernels import native, packing
from fastlm.kernels.cpu import lstm
from fastlm.reference.lstm import lstm_cell

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


NAMES = ("output", "h_n", "c_n", "input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h0", "c0")


class Case:
    """One direction of a layer: torch's module, and random inputs and gradients of the results."""

    def __init__(
        self, inputs: int, hidden: int, projected: int, batch_sizes: Sequence[int], *, reverse: bool, bias: bool = True
    ) -> None:
        self.batch_sizes, self.reverse = list(batch_sizes), reverse
        rows, batch, outputs = sum(batch_sizes), batch_sizes[0], projected or hidden
        self.module = torch.nn.LSTM(inputs, hidden, bias=bias, bidirectional=reverse, proj_size=projected)
        suffix = "_l0_reverse" if reverse else "_l0"
        self.names = [
            name + suffix if getattr(self.module, name + suffix, None) is not None else None
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        ]
        self.input, self.h0, self.c0 = (
            torch.randn(rows, inputs),
            torch.randn(batch, outputs),
            torch.randn(batch, hidden),
        )
        self.grads = torch.randn(rows, outputs), torch.randn(batch, outputs), torch.randn(batch, hidden)

    @property
    def weights(self) -> list[Tensor | None]:
        return [None if name is None else getattr(self.module, name) for name in self.names]

    def torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """torch's results and gradients."""
        module = copy.deepcopy(self.module).to(dtype)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.input, self.h0, self.c0)]
        weights = [None if name is None else getattr(module, name) for name in self.names]
        states = [torch.stack([leaf] * (2 if self.reverse else 1)) for leaf in leaves[1:]]
        output, (h_n, c_n) = module(PackedSequence(leaves[0], torch.tensor(self.batch_sizes)), tuple(states))
        results = [output.data[:, -self.h0.shape[1] :], h_n[-1], c_n[-1]]
        wanted = [leaves[0], *weights, *leaves[1:]]
        given = [t for t in wanted if t is not None]
        grads = iter(torch.autograd.grad(results, given, [g.to(dtype) for g in self.grads]))
        found = [*results, *(None if t is None else next(grads) for t in wanted)]
        return {name: t.detach() for name, t in zip(NAMES, found, strict=True) if t is not None}

    def native(self, batch: slice | None = None, *, save: bool = True) -> dict[str, Tensor]:
        """Ours; with `batch`, of those sequences alone (batch sizes all equal)."""
        input, h0, c0, sizes = self.input, self.h0, self.c0, self.batch_sizes
        grad_output, grad_h, grad_c = self.grads
        if batch is not None:
            steps = len(sizes)
            input = input.view(steps, sizes[0], -1)[:, batch].flatten(0, 1)
            grad_output = grad_output.view(steps, sizes[0], -1)[:, batch].flatten(0, 1)
            h0, c0, grad_h, grad_c = h0[batch], c0[batch], grad_h[batch], grad_c[batch]
            sizes = [h0.shape[0]] * steps
        *results, saved = lstm.layer_forward(input, sizes, *self.weights, h0, c0, self.reverse, save)
        if saved is None:
            return dict(zip(NAMES, results, strict=False))
        grads = lstm.layer_backward(saved, grad_output, grad_h, grad_c, [True] * 8)
        found = dict(zip(NAMES, [*results, *grads], strict=True))
        return {name: t for name, t in found.items() if t is not None and self.has(name)}

    def has(self, name: str) -> bool:
        return not (name.startswith("b_") and self.names[2] is None)

    def check(self, found: dict[str, Tensor], *, floor: float = 2e-6, least: float = 0.0) -> None:
        """By the project's bound, the floor relative to the result's magnitude or `least`, whichever is greater."""
        exact, peer = self.torch(torch.float64), self.torch(torch.float32)
        assert found.keys() == exact.keys()
        for name, value in found.items():
            magnitude = float(exact[name].abs().max())
            relative = floor * max(1.0, least / magnitude) if magnitude else floor
            assert_close_to_reference(value, peer[name], exact[name], floor=relative)


RAGGED = [7, 7, 5, 2, 2, 1]
SHAPES = [
    (3, 5, 0, [1]),
    (16, 16, 0, [4] * 3),
    (37, 50, 0, RAGGED),
    (130, 150, 0, [70] * 3),  # more rows than a chunk holds, more columns than a block of the sum
    (64, 64, 0, [2] * 150),  # more than one chunk of steps
    (20, 33, 7, RAGGED),
    (30, 64, 40, [9] * 4),
    (70, 90, 0, [20, 20, 17, 16, 9, 8, 7, 1]),  # in digits, where there are tiles
    (130, 64, 0, [300] * 2),  # more rows than a chunk of those
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("inputs", "hidden", "projected", "batch_sizes"), SHAPES)
def test_agrees_with_torch(
    isa: str, inputs: int, hidden: int, projected: int, batch_sizes: list[int], reverse: bool
) -> None:
    case = Case(inputs, hidden, projected, batch_sizes, reverse=reverse)
    case.check(case.native())


def test_agrees_with_torch_without_bias(isa: str) -> None:
    case = Case(9, 21, 0, RAGGED, reverse=False, bias=False)
    case.check(case.native())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40),
    st.integers(2, 40),
    st.integers(0, 20),
    st.lists(st.integers(1, 9) | st.integers(8, 20), min_size=1, max_size=8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(inputs: int, hidden: int, projected: int, sizes: list[int], reverse: bool, seed: int) -> None:
    torch.manual_seed(seed)
    case = Case(inputs, hidden, min(projected, hidden - 1), sorted(sizes, reverse=True), reverse=reverse)
    # A result of one number may be what is left of terms a thousand times larger, which are of the order of 0.1 at
    # least, and torch's error in it nothing.
    case.check(case.native(), floor=1e-5, least=0.1)


# In digits, up to five rows lie in a tile together, six to sixteen have one for each digit.
@pytest.mark.parametrize(
    ("batch", "parts"), [(7, [(0, 1), (4, 6), (1, 7)]), (21, [(0, 8), (4, 13), (3, 20), (16, 21), (7, 8)])]
)
@pytest.mark.parametrize("projected", [0, 24])
@pytest.mark.parametrize("reverse", [False, True])
def test_bits_do_not_depend_on_batch_threads_or_saving(
    isa: str, reverse: bool, projected: int, batch: int, parts: list[tuple[int, int]]
) -> None:
    case = Case(70, 200, projected, [batch] * 20, reverse=reverse)
    case.input[::3] *= 100  # too large for digits
    whole = case.native()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = case.native()
            for name in (*NAMES[:3], "h0", "c0"):
                assert torch.equal(again[name], whole[name]), (threads, name)
            inference = case.native(save=False)
            for name in NAMES[:3]:
                assert torch.equal(inference[name], whole[name]), (threads, name)
    finally:
        torch.set_num_threads(before)
    for rows in (slice(*part) for part in parts):
        part = case.native(rows)
        steps = whole["output"].view(20, batch, -1)[:, rows].flatten(0, 1)
        assert torch.equal(part["output"], steps)
        for name in ("h_n", "c_n", "h0", "c0"):
            assert torch.equal(part[name], whole[name][rows]), name


def test_a_rows_bits_do_not_depend_on_the_others_lengths(isa: str) -> None:
    """The last row that goes on is multiplied as it was beside all the others."""
    case = Case(24, 80, 0, [9] * 12, reverse=False)
    whole = case.native(save=False)["output"].view(12, 9, -1)
    sizes = [9, 9, 8, 4, 4, 1, 1, 1, 1, 1, 1, 1]
    rows = torch.cat([torch.arange(size) + 9 * step for step, size in enumerate(sizes)])
    output, *_ = lstm.layer_forward(case.input[rows], sizes, *case.weights, case.h0, case.c0, False, False)
    assert torch.equal(output, whole.flatten(0, 1)[rows])


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 3000, 2100), (100, 1500, 70), (70, 3000, 130), (300, 400, 600), (259, 1100, 650)]
)
@pytest.mark.parametrize("across", [False, True])
def test_products_are_as_accurate_as_torchs(rows: int, depth: int, columns: int, across: bool) -> None:
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    left *= torch.logspace(-3, 3, rows)[:, None]  # each row in its own scale
    if across:
        left = left.t().contiguous().t()
    exact = left.double() @ right.double()
    found = lstm.product(left, right)
    # Row by row: the small ones are as exact as the large.
    for got, peer, want in zip(found, left @ right, exact, strict=True):
        assert_close_to_reference(got, peer, want, floor=5e-7)
    left[0, 1] = torch.inf
    found = lstm.product(left, right)
    assert not found[0].isfinite().any()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("what", ["input", "weight"])
def test_numbers_of_unlike_size_are_as_accurate(what: str) -> None:
    case = Case(128, 96, 0, [12] * 6, reverse=False)
    if what == "input":
        case.input[:, 3] *= 200
    else:
        for weight in case.weights[:2]:
            assert weight is not None
            weight.data[:, 5] *= 100
    case.check(case.native())


def test_gradients_are_deterministic(isa: str) -> None:
    case = Case(70, 200, 0, RAGGED, reverse=False)
    first, second = case.native(), case.native()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch", [1, 2, 50])
@pytest.mark.parametrize("hidden", [33, 256])
def test_cell_gives_the_bits_of_the_layer(isa: str, batch: int, hidden: int) -> None:
    case = Case(140, hidden, 0, [batch] * 3, reverse=False)
    h, c = case.h0, case.c0
    for x in case.input.view(3, batch, -1):
        output, h_n, c_n, _ = lstm.layer_forward(x, [batch], *case.weights, h, c, False, False)
        h, c = lstm.cell(x, h, c, *case.weights[:4])
        assert torch.equal(h, output)
        assert torch.equal(h, h_n)
        assert torch.equal(c, c_n)
    # Several steps at once, too.
    _, h_n, c_n, _ = lstm.layer_forward(case.input, [batch] * 3, *case.weights, case.h0, case.c0, False, False)
    assert torch.equal(h, h_n)
    assert torch.equal(c, c_n)


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_cell_takes_rows_of_unlike_numbers_apart(batch: int) -> None:
    """Digits are too coarse for a row with one feature far above its others: no other row may show that it is there,
    nor may the order in which such rows come."""
    case = Case(140, 64, 0, [batch] * 4, reverse=False)
    steps = case.input.view(4, batch, -1)
    plain, _ = lstm.cell(steps[1], case.h0, case.c0, *case.weights[:4])
    steps[2] = steps[1]
    steps[1, batch - 1, 3] = 300.0
    steps[3] = steps[1]
    seen = [lstm.cell(x, case.h0, case.c0, *case.weights[:4]) for x in steps]
    assert torch.equal(seen[2][0], plain)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))
    assert torch.equal(seen[1][0][: batch - 1], plain[: batch - 1])
    peers = []
    for dtype in (torch.float64, torch.float32):
        w_ih, w_hh, b_ih, b_hh = (None if w is None else w.to(dtype) for w in case.weights[:4])
        assert w_ih is not None and w_hh is not None
        args = (steps[1].to(dtype), case.h0.to(dtype), case.c0.to(dtype), w_ih, w_hh, b_ih, b_hh)
        peers.append(lstm_cell(*args))
    for got, want, peer in zip(seen[1], *peers, strict=True):
        assert_close_to_reference(got, peer, want)


def test_a_sequence_in_pieces_gives_the_same(isa: str) -> None:
    case = Case(40, 72, 0, [3] * 200, reverse=False)
    whole = case.native(save=False)
    h, c, outputs = case.h0, case.c0, []
    for piece in case.input.view(200, 3, -1).split([1, 99, 50, 50]):
        output, h, c, _ = lstm.layer_forward(piece.flatten(0, 1), [3] * len(piece), *case.weights, h, c, False, False)
        outputs.append(output)
    assert torch.equal(torch.cat(outputs), whole["output"])
    assert torch.equal(c, whole["c_n"])


def test_strided_arguments_and_partial_needs(isa: str) -> None:
    case = Case(12, 20, 0, [3] * 4, reverse=False)
    expected = case.native()
    case.input = torch.stack([case.input] * 2, -1)[..., 0]
    case.h0 = case.h0.t().contiguous().t()
    weights = [torch.stack([w] * 2, -1)[..., 0] for w in case.weights[:4]]
    *results, saved = lstm.layer_forward(case.input, [3] * 4, *weights, None, case.h0, case.c0, False, True)
    for name, value in zip(NAMES, results, strict=False):
        assert torch.equal(value, expected[name])
    grad_output = torch.stack([case.grads[0]] * 2, -1)[..., 0]
    only = lstm.layer_backward(
        saved, grad_output, *case.grads[1:], [False, True, False, False, True, False, False, True]
    )
    assert [g is not None for g in only] == [False, True, False, False, True, False, False, True]
    assert torch.equal(only.w_ih, expected["w_ih"])
    assert torch.equal(only.b_hh, expected["b_hh"])
    assert torch.equal(only.c0, expected["c0"])


def test_missing_gradients_are_zero(isa: str) -> None:
    case = Case(5, 19, 0, RAGGED, reverse=True)
    *_, saved = lstm.layer_forward(case.input, RAGGED, *case.weights, case.h0, case.c0, True, True)
    zeros = [torch.zeros_like(g) for g in case.grads]
    for present in range(3):
        grads = [case.grads[i] if i == present else None for i in range(3)]
        filled = [case.grads[i] if i == present else zeros[i] for i in range(3)]
        for ours, expected in zip(lstm.layer_backward(saved, *grads), lstm.layer_backward(saved, *filled), strict=True):
            assert ours is None or torch.equal(ours, expected)


@pytest.mark.parametrize("batch", [4, 18])
def test_nan_stays_in_its_row(isa: str, batch: int) -> None:
    case = Case(8, 24, 0, [batch] * 5, reverse=False)
    clean = case.native(save=False)["output"].view(5, batch, -1)
    case.input[2 * batch + 1] = float("nan")  # sequence 1, step 2
    output = case.native(save=False)["output"].view(5, batch, -1)
    assert output[2:, 1].isnan().all()
    output[2:, 1] = clean[2:, 1]
    assert torch.equal(output, clean)


@pytest.mark.parametrize("batch_sizes", [[], [2, 3], [2, 0], [4], [2, 1], [3, 1]])
def test_bad_batch_sizes_are_refused(batch_sizes: list[int]) -> None:
    case = Case(4, 8, 0, [2, 2], reverse=False)
    with pytest.raises(ValueError, match="batch_sizes"):
        lstm.layer_forward(case.input, batch_sizes, *case.weights, case.h0, case.c0, False, False)


def test_threads_at_once_do_not_disturb_each_other(isa: str) -> None:
    cases = [Case(30, 140, 0, [3] * 10, reverse=False) for _ in range(4)]
    expected = [case.native(save=False)["output"] for case in cases]
    packing.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: cases[i % 4].native(save=False)["output"], range(16)))
    for i, output in enumerate(found):
        assert torch.equal(output, expected[i % 4])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_the_same() -> None:
    case = Case(64, 512, 0, [4] * 4, reverse=False)  # enough work for several threads
    expected = case.native(save=False)["output"]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.use_deterministic_algorithms(False)  # poisoning uses torch's own threads, which a fork does not survive
        packing.clear()
        sender.send(torch.equal(case.native(save=False)["output"], expected))

    process = context.Process(target=child, daemon=True)
    process.start()
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv()
    process.join(60)
    assert process.exitcode == 0


# Tests of the tests: a faulty kernel, as seen by the very comparison used above.


def _swapped_gates(case: Case, found: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for weight in case.weights[:4]:
            weight.copy_(torch.cat([weight.chunk(4)[i] for i in (0, 1, 3, 2)]))
    found.update(case.native())


FAULTS = {
    "zeros": lambda case, found: found.update(output=torch.zeros_like(found["output"])),
    "zero gradient": lambda case, found: found.update(w_hh=torch.zeros_like(found["w_hh"])),
    "rows shifted by one": lambda case, found: found.update(output=found["output"].roll(1, 0)),
    "unwritten": lambda case, found: found["h_n"][0].fill_(float("nan")),
    "wrong state on joining": lambda case, found: found.update(h0=found["h0"].roll(1, 0)),
}


@pytest.mark.parametrize("fault", [*FAULTS, "gates swapped"])
def test_a_fault_is_noticed(fault: str) -> None:
    case = Case(11, 18, 0, RAGGED, reverse=True)
    found = case.native()
    case.check(found)
    if fault == "gates swapped":
        faulty = copy.deepcopy(case)
        _swapped_gates(faulty, found)
    else:
        FAULTS[fault](case, found)
    with pytest.raises(AssertionError):
        case.check(found)


class TestPackedWeights:
    """What `cached` may and may not remember."""

    @staticmethod
    def step(case: Case) -> Tensor:
        h, _ = lstm.cell(case.input[:1], case.h0[:1], case.c0[:1], *case.weights[:4])
        return h

    def fresh(self, case: Case) -> Tensor:
        packing.clear()
        return self.step(case)

    def test_is_kept_while_nothing_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(6, 20, 0, [1], reverse=False)
        before = self.step(case)
        monkeypatch.setattr(lstm, "pack", lambda *_, **__: pytest.fail("packed again"))
        assert torch.equal(self.step(case), before)

    @pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "data", "write through data", "bias", "half"])
    def test_is_never_stale(self, change: str) -> None:
        case = Case(6, 20, 0, [1], reverse=False)
        before = self.step(case)
        module = case.module
        if change == "optimizer":
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
            module(case.input)[0].sum().backward()
            optimizer.step()
        elif change == "load_state_dict":
            module.load_state_dict(torch.nn.LSTM(6, 20).state_dict())
        elif change == "data":
            module.weight_hh_l0.data = torch.randn(80, 20)
        elif change == "write through data":
            module.weight_hh_l0.data.mul_(2)
        elif change == "bias":
            with torch.no_grad():
                module.bias_hh_l0[0] += 1
        else:
            module.to(torch.float64).to(torch.float32)
            with torch.no_grad():
                module.weight_ih_l0 += 1
        after = self.step(case)
        assert not torch.equal(after, before)
        assert torch.equal(after, self.fresh(case))

    def test_inference_tensors_are_not_kept(self) -> None:
        case = Case(6, 20, 0, [1], reverse=False)
        with torch.inference_mode():
            weights = [w.clone() for w in case.weights[:4]]
            first, _ = lstm.cell(case.input, case.h0, case.c0, *weights)
            weights[1][3, 3] += 1
            second, _ = lstm.cell(case.input, case.h0, case.c0, *weights)
        assert not torch.equal(first, second)

    def test_goes_with_the_weights(self) -> None:
        packing.clear()
        case = Case(6, 20, 0, [1], reverse=False)
        self.step(case)
        assert packing._entries
        del case
        import gc

        gc.collect()
        assert len(packing._entries) == 0
