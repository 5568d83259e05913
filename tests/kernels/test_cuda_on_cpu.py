"""The CUDA kernels, run on the CPU by csrc/tests/shim, against the references: values, gradients, tokens, no race."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import cuda_on_cpu
import pytest
import torch
from chi_square import ACTIVE, exact_distribution, p_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_cases import (
    Case,
    any_case,
    call,
    case_for_fault,
    compare,
    faults,
    make_inputs,
    named_results,
    run_reference,
)
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.kernels import cuda, native
from fastlm.kernels.cuda import gru as gru_kernel
from fastlm.kernels.cuda import lstm as lstm_kernel
from fastlm.ops.recurrent_variants import layer_by
from fastlm.reference import gru as gru_reference
from fastlm.reference import lstm as lstm_reference
from fastlm.reference.recurrent import Noise, sequence

_SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def shim() -> Iterator[Any]:
    with cuda_on_cpu.device(seed=1) as module:
        yield module


def by_cuda(case: Case, inputs: Any) -> list[Tensor]:
    with ops.backend("cuda"):
        return call(case, inputs)


LSTM = Case(op="lstm_variant")
GRU = Case(op="gru_variant", hidden=9, width=9)
NORM = {"layer_norm": True, "width": 9}
RAGGED = {"batch": 9, "lengths": (4, 4, 3, 3, 3, 3, 2, 1, 1), "bidirectional": True}
GRID = [
    LSTM,
    replace(LSTM, hidden=33, batch=1, noise="d"),
    replace(LSTM, hidden=40, noise="dhc", **RAGGED),
    replace(LSTM, lengths=(5, 2, 1), noise="e", bias=False, num_layers=2),
    replace(LSTM, hidden=17, **NORM),
    replace(LSTM, hidden=16, lengths=(4, 3, 1), noise="dhc", bidirectional=True, **NORM),
    replace(LSTM, hidden=12, noise="e", bias=False, batch_first=True, **NORM),
    # Every variant and every pair of them, then all else.
    *(replace(GRU, layer_norm=norm, noise=noise) for norm in (False, True) for noise in ("", "d", "h", "dh")),
    replace(GRU, hidden=300, steps=2, layer_norm=True, noise="dh"),
    replace(GRU, hidden=33, batch=1, noise="e"),
    replace(GRU, hidden=40, noise="dh", **RAGGED),
    replace(GRU, hidden=17, noise="dh", **RAGGED, **NORM),
    replace(GRU, hidden=12, noise="e", bias=False, num_layers=2, batch_first=True, **NORM),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_variants_meet_the_bound(case: Case) -> None:
    torch.manual_seed(0)
    compare(case, by_cuda, floor=1e-5, least=1e-3)


@pytest.mark.parametrize("op", ["lstm_variant", "gru_variant"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_autocast_does_not_reach_the_products(op: str, layer_norm: bool) -> None:
    """They would be of another dtype than the kernel is told; the backward may be called within autocast as well."""
    torch.manual_seed(0)
    case = replace(Case(op=op, width=9, hidden=9), layer_norm=layer_norm, noise="dh", lengths=(3, 3, 2))
    inputs = make_inputs(case).to(torch.float32)
    want = named_results(case, inputs, by_cuda)
    with torch.autocast("cpu", torch.bfloat16):
        found = named_results(case, inputs, by_cuda)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_normalisation_keeps_no_row_of_gates_in_shared_memory(shim: Any) -> None:
    """Which would bound the hidden size."""
    shim.set_options(1, True, 3, 8 * 40 + 32)
    torch.manual_seed(0)
    for case in (LSTM, GRU):
        compare(replace(case, hidden=40, **NORM), by_cuda, floor=1e-5, least=1e-3)
    with pytest.raises(RuntimeError, match="too large for shared memory"):
        compare(replace(LSTM, hidden=41, **NORM), by_cuda)


@pytest.mark.parametrize(("multiprocessors", "shared"), [(1, 64 << 10), (7, 9000), (2, 20000)])
def test_blocks_and_shared_memory_change_nothing(shim: Any, multiprocessors: int, shared: int) -> None:
    """Weights for which shared memory has no room are read where they are, forward and backward."""
    shim.set_options(2, True, multiprocessors, shared)
    torch.manual_seed(0)
    compare(replace(LSTM, hidden=45, batch=9, noise="dhc", lengths=(4, 4, 3, 1)), by_cuda, floor=1e-5, least=1e-3)


@pytest.mark.slow
@settings(parent=_SETTINGS, max_examples=40)
@given(case=any_case("lstm_variant") | any_case("gru_variant"))
def test_any_variant_meets_the_bound(case: Case) -> None:
    compare(case, by_cuda, floor=1e-5, least=1e-3)


@pytest.mark.parametrize(("op", "kernel"), [("lstm_variant", lstm_kernel), ("gru_variant", gru_kernel)])
@pytest.mark.parametrize("fault", sorted(faults(layer_by(lstm_kernel))))
def test_faults_are_found(fault: str, op: str, kernel: Any) -> None:
    torch.manual_seed(0)
    wrong = faults(layer_by(kernel))[fault]

    def run(case: Case, inputs: Any) -> Any:
        layout = (case.num_layers, case.bidirectional, case.batch_first, case.bias, 0.0, case.layer_norm)
        states = tuple(inputs.states)
        output, final = sequence(
            wrong, inputs.input, states, inputs.weights, inputs.batch_sizes, *layout, Noise(*inputs.noise)
        )
        return [output, *final]

    with pytest.raises(AssertionError, match="exceeds"):
        compare(case_for_fault(op, fault), run, floor=1e-5, least=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("op", ["lstm_variant", "gru_variant"])
def test_half_precision_meets_the_bound(op: str, dtype: torch.dtype, layer_norm: bool) -> None:
    """Rounding is that of the storage: the error is that of the reference in that dtype at most."""
    torch.manual_seed(0)
    case = Case(op=op, hidden=24, width=9, layer_norm=layer_norm, noise="dhc", lengths=(3, 3, 2))
    low = make_inputs(case).to(dtype)
    exact = named_results(case, low.to(torch.float64), run_reference)
    peer = named_results(case, low, run_reference)
    for name, found in named_results(case, low, by_cuda).items():
        assert found.dtype == dtype
        assert_close_to_reference(found, peer[name], exact[name], floor=float(torch.finfo(dtype).eps))


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "inputs", "hidden"), [(1, 8, 32), (3, 7, 5), (8, 16, 24), (1, 3, 1)])
def test_lstm_step(batch: int, inputs: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = ((batch, inputs), (batch, hidden), (batch, hidden), (4 * hidden, inputs), (4 * hidden, hidden))
    x, h, c, *weights = normal(*shapes, (4 * hidden,), (4 * hidden,), dtype=dtype)
    with ops.backend("cuda"):
        found = ops.lstm_cell(x, (h, c), *weights)
        sequence_output, final = ops.lstm(x[None], (h[None], c[None]), weights)
    assert torch.equal(sequence_output[0], found[0]) and torch.equal(final[1][0], found[1])
    peer = lstm_reference.lstm_cell(x, h, c, *weights)
    exact = lstm_reference.lstm_cell(*(t.double() for t in (x, h, c, *weights)))
    for ours, theirs, want in zip(found, peer, exact, strict=True):
        assert_close_to_reference(ours, theirs, want, floor=2 * float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "inputs", "hidden"), [(1, 3, 1), (3, 7, 5), (2, 9, 300)])
def test_gru_cell_and_its_gradients(batch: int, inputs: int, hidden: int, bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(batch, inputs), (batch, hidden), (3 * hidden, inputs), (3 * hidden, hidden)]
    tensors = [t.requires_grad_() for t in normal(*shapes, *[(3 * hidden,)] * (2 * bias))]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    with ops.backend("cuda"):
        found = ops.gru_cell(*tensors)
    peer, exact = ops.gru_cell(*tensors), gru_reference.gru_cell(*wide)
    (grad,) = normal((batch, hidden))
    triples = [(found, peer, exact)]
    gradients = (
        torch.autograd.grad(o, t, grad.to(o.dtype)) for o, t in ((found, tensors), (peer, tensors), (exact, wide))
    )
    triples += zip(*gradients, strict=True)
    for ours, theirs, want in triples:
        assert_close_to_reference(ours.detach(), theirs.detach(), want.detach(), floor=1e-5)


def test_only_ragged_batches_need_a_table_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the device can't be recorded in a CUDA graph; and the table of one stream is not another's."""
    made, layout = [], lstm_kernel._layout

    def noted(*arguments: Any) -> tuple[Tensor, Tensor]:
        made.append(layout(*arguments))
        return made[-1]

    monkeypatch.setattr(lstm_kernel, "_layout", noted)
    for lengths, tables in ((None, 0), ((3, 3, 3), 0), ((3, 2, 1), 1), ((3, 2, 1), 2)):
        monkeypatch.setattr(cuda, "stream", lambda device, stream=tables: stream)
        with torch.no_grad():
            by_cuda(replace(LSTM, lengths=lengths), make_inputs(replace(LSTM, lengths=lengths)).to(torch.float32))
        assert len(made) == tables
    assert made[0][0] is not made[1][0]


def test_a_graph_of_a_ragged_batch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LSTM, lengths=(3, 2, 1))
    inputs = make_inputs(case).to(torch.float32)
    monkeypatch.setattr(lstm_kernel.native, "values_unknown", lambda: True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="different lengths cannot be recorded"):
        by_cuda(case, inputs)


def test_sizes_of_zero(shim: Any) -> None:
    """A hidden size of 0 has no blocks to divide the units among."""
    for case in (LSTM, GRU):
        for norm in (False, True):
            inputs = make_inputs(replace(case, hidden=1, layer_norm=norm)).to(torch.float32)
            none = [t[..., :0] if t.dim() == 3 else t[:0] for t in (*inputs.states, *inputs.weights)]
            states, weights = none[: case.states], none[case.states :]
            weights[1] = weights[1][:, :0]
            with ops.backend("cuda"):
                found = getattr(ops, case.op)(
                    inputs.input, states if case.states == 2 else states[0], weights, layer_norm=norm
                )
            assert found[0].shape == (*inputs.input.shape[:2], 0)
    x, h = torch.zeros(0, 8), torch.zeros(0, 6)
    reasons = dict(ops.explain("gru_cell", x, h, *normal((18, 8), (18, 6))).reasons)
    assert reasons["cuda"] == "the batch is empty"


def test_a_device_without_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h = normal((2, 8), (2, 6))
    weights = normal((18, 8), (18, 6))
    old = ModuleType("_cuda")
    vars(old).update(on_cpu=True, device_error=lambda: "no kernel image is available")
    monkeypatch.setattr(native.CUDA, "module", old)
    reason = dict(ops.explain("gru_cell", x, h, *weights).reasons)["cuda"]
    assert reason == "the kernels can't run on cpu: no kernel image is available"


def test_dispatch_says_why() -> None:
    x, h = torch.zeros(4, 2, 8), torch.zeros(1, 2, 8)
    weights = normal((32, 8), (32, 8), (32,), (32,))
    assert "cuDNN" in dict(ops.explain("lstm", x, (h, h), weights).reasons)["cuda"]
    assert dict(ops.explain("lstm", x[:1], (h, h), weights).reasons)["cuda"] is None
    many = torch.zeros(9, 8)
    assert "9 rows" in dict(ops.explain("lstm_cell", many, (many, many), *weights).reasons)["cuda"]
    reasons: list[Any] = []

    def cell(row: Tensor) -> Tensor:
        reasons.append(dict(ops.explain("lstm_cell", row, (row, row), *weights).reasons)["cuda"])
        return row

    torch.func.vmap(cell)(x)
    assert reasons == ["inside a transform of torch.func"]
    wide = [w.double() for w in weights]
    assert "float64" in dict(ops.explain("lstm_cell", x[0].double(), (h[0].double(),) * 2, *wide).reasons)["cuda"]


# What may differ from row to row, as the op takes it.
ROW = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0, 1e4]),
    "top_k": st.sampled_from([0, 1, 2, 7, 50, 300, 10**9]),
    "top_p": st.sampled_from([1.0, 0.9, 0.5, 1e-9, 0.999999]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    "presence_penalty": st.sampled_from([0.0, 0.4, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.2]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "position": st.integers(0, 2**32 - 1),
}


@settings(parent=_SETTINGS, max_examples=50)
@given(data=st.data())
def test_tokens_are_those_of_cpu_and_reference(shim: Any, data: st.DataObject) -> None:
    """Bit for bit the same, whatever the options, the storage, and the number of blocks that share a row."""
    draw = data.draw
    batch, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 31, 33, 100, 513, 700]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = torch.randn(batch, vocab, generator=generator) * draw(st.sampled_from([0.0, 1.0, 4.0, 30.0]))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2  # many equal ones
    logits[:, 1:][torch.rand(batch, vocab - 1, generator=generator) < 0.1] = -torch.inf
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    options: dict[str, Any] = {}
    for name, values in ROW.items():
        if draw(st.booleans()):
            rows = draw(st.booleans())
            drawn = [draw(values) for _ in range(batch)]
            options[name] = torch.tensor(drawn) if rows else drawn[0]
    if draw(st.booleans()):
        options["logit_bias"] = torch.randn(vocab, generator=generator)
    if draw(st.booleans()):
        options["history"] = torch.randint(min(vocab, 20), (batch, 12), generator=generator)
        options["history_lengths"] = torch.randint(13, (batch,), generator=generator)
        options["prompt_lengths"] = draw(st.integers(0, 12))
    found = {}
    for name in ("reference", "cpu", "cuda"):
        with ops.backend(name):
            found[name] = ops.sample(logits, **options).tolist()
    assert found["cuda"] == found["reference"] == found["cpu"]


@pytest.mark.parametrize("multiprocessors", [1, 12])
def test_rows_shared_by_blocks_draw_the_same(shim: Any, multiprocessors: int) -> None:
    shim.set_options(3, False, multiprocessors, 64 << 10)
    torch.manual_seed(0)
    logits = torch.randn(3, 20000) * 3
    logits[1] = (logits[1] / 4).round()  # so that thousands are alike
    logits[2] = 1.0
    history = torch.randint(20000, (3, 30))
    choices: list[dict[str, Any]] = [{}, {"top_p": 0.6, "repetition_penalty": 1.2, "history": history}]
    # What is left of top_k goes on a list, at once or after some digits, or does not fit on it.
    choices += [{"top_k": k, "top_p": 0.9, "temperature": 1.5} for k in (1, 40, 2000, 2048, 2049, 15000)]
    choices += [{"top_k": 300, "repetition_penalty": 1.2, "history": history}, {"top_k": 500, "min_p": 0.05}]
    for options in choices:
        drawn = []
        for name in ("cpu", "cuda"):
            with ops.backend(name):
                drawn.append(ops.sample(logits, position=5, **options).tolist())
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("names", [(), ("top_k", "top_p"), ("temperature", "min_p", "logit_bias"), tuple(ACTIVE)])
def test_frequencies_follow_the_distribution(shim: Any, names: tuple[str, ...]) -> None:
    shim.set_options(0, False, 3, 64 << 10)
    torch.manual_seed(0)
    logits, draws = torch.randn(30) * 2, 800
    history = torch.randint(30, (6,))
    options = {name: ACTIVE[name] for name in names}
    with ops.backend("cuda"):
        found = ops.sample(
            logits.expand(draws, 30), history=history.expand(draws, 6), prompt_lengths=2, seed=5, **options
        )
    exact = exact_distribution(logits, history, 2, **options)
    assert p_value(found, exact) > 1e-4
    wrong = (exact + torch.roll(exact, 1)) / 2  # the test of the test
    assert p_value(found, wrong) < 1e-4


def test_sample_refuses_what_cannot_be_drawn_from() -> None:
    logits = torch.zeros(3, 40)
    logits[1, 7] = torch.nan
    with ops.backend("cuda"):
        with pytest.raises(ValueError, match="row 1: the logit of token 7 is NaN"):
            ops.sample(logits)
        with native.recording_on_device():  # where nobody may wait for the tokens
            assert ops.sample(logits, seed=1).tolist()[1] == -1
        assert int(ops.sample(logits[2:], seed=1)) >= 0


def test_a_kernel_that_goes_out_of_bounds_is_found() -> None:
    """The test of the test: the wrapper lies about a size."""
    h = torch.zeros(2, 8)
    tensors = {"gates_x": torch.zeros(2, 31), "c_prev": h, "h": h.clone(), "c": h.clone()}
    with pytest.raises(RuntimeError, match=r"out of bounds, \d bytes past the end of gates_x"):
        native.CUDA.require().lstm_cell(0, 2, 8, cuda.addresses(tensors), 0)
    with pytest.raises(ValueError, match="takes no tensor gate"):
        native.CUDA.require().lstm_cell(0, 2, 8, cuda.addresses(tensors | {"gate": h}), 0)
