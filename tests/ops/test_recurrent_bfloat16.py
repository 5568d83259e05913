"""The recurrent ops in bfloat16: the native kernels with packed bfloat16 weights and float32 states."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_cases import (
    Case,
    call,
    case_for_fault,
    cases,
    compare,
    faults,
    inference,
    make_inputs,
    named_results,
    poisoned_memory,
    run_backend,
)
from torch import Tensor

import fastlm.nn
from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.packing import pack

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))
BFLOAT = {"dtype": torch.bfloat16, "floor": 4e-3}  # one rounding of a result
implementation: Any = sys.modules["fastlm.ops.lstm"]


def test_lstm_agrees_at_every_level(isa: str) -> None:
    with poisoned_memory():
        for case in cases("lstm"):
            compare(case, run_backend("cpu"), **BFLOAT)


@pytest.mark.parametrize("op", ["gru", "rnn"])
def test_gru_and_rnn_agree_without_gradients(op: str, isa: str) -> None:
    with poisoned_memory(), torch.no_grad():
        for case in cases(op):
            inputs = make_inputs(case).to(torch.bfloat16)
            exact = inference(case, inputs.to(torch.float64), run_backend("reference"))
            for name, found in inference(case, inputs, run_backend("cpu")).items():
                assert found.dtype == torch.bfloat16
                torch.testing.assert_close(found.double(), exact[name], rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("op", ["gru", "rnn"])
def test_gru_and_rnn_agree_with_gradients(op: str, isa: str) -> None:
    with poisoned_memory():
        for case in cases(op):
            compare(case, run_backend("cpu"), **BFLOAT)


@pytest.mark.parametrize(("k", "n", "gates"), [(1, 8, 4), (33, 80, 4), (70, 105, 3), (129, 130, 0)])
def test_packs_the_numbers_of_float32(k: int, n: int, gates: int, isa: str) -> None:
    vectors, lanes = gates or 4, native.CPU.require().simd_lanes()
    for matrix in (torch.randn(n, k).bfloat16().t(), torch.randn(k, n).bfloat16()):
        pairs = pack(matrix, gates=gates).view(-1, (k + 1) // 2, vectors, lanes, 2)
        found = pairs.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :k].float()
        assert torch.equal(found, pack(matrix.float(), gates=gates).view(-1, k, vectors, lanes))


def test_many_rows_go_to_the_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(op: str, rows: int, steps: int = 5) -> str | None:
        inputs = make_inputs(Case(op=op, batch=rows, steps=steps)).to(torch.bfloat16)
        hx = tuple(inputs.states) if op == "lstm" else inputs.states[0]
        return ops.explain(op, inputs.input, hx, inputs.weights).chosen

    for present in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda present=present: present)
        many = "torch" if present else "cpu"
        assert [chosen("lstm", rows) for rows in (7, 8)] == ["cpu", many]
        for op in ("gru", "rnn"):
            assert [chosen(op, rows) for rows in (31, 32)] == ["cpu", many]
    assert chosen("lstm", 8, steps=1) == "cpu"


@pytest.mark.parametrize("noise", ["", "dhc"])
@pytest.mark.parametrize("op", ["lstm_variant", "gru_variant"])
def test_variants_agree(op: str, noise: str) -> None:
    for norm in (False, True):
        case = Case(op=op, hidden=33, width=9, layer_norm=norm, noise=noise, lengths=(5, 5, 3, 1))
        compare(case, run_backend("cpu"), dtype=torch.bfloat16, floor=2e-2, least=0.1)


@pytest.mark.parametrize("op", ["lstm_cell", "gru_cell"])
def test_cells_agree(op: str) -> None:
    gates = 4 if op == "lstm_cell" else 3
    tensors = [torch.randn(s) for s in ((3, 9), (3, 21), (3, 21), (gates * 21, 9), (gates * 21, 21), (gates * 21,))]
    x, h, c, w_ih, w_hh, bias = (t.bfloat16().requires_grad_(op == "lstm_cell") for t in tensors)

    def run(*given: Tensor) -> list[Tensor]:
        x, h, c, *weights = given
        state = (h, c) if op == "lstm_cell" else h
        found = getattr(ops, op)(x, state, *weights)
        return list(found) if op == "lstm_cell" else [found]

    given = (x, h, c, w_ih, w_hh, bias, bias)
    with ops.backend("cpu"):
        found = run(*given)
    for a, b in zip(found, run(*(t.detach().double() for t in given)), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-7)
    if op == "lstm_cell":
        assert torch.autograd.grad(found[0].sum(), w_hh)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("fault", faults(lambda *_: None))  # type: ignore[arg-type, return-value]
def test_the_comparison_refuses_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = implementation._cpu_layer
    compare(case_for_fault("lstm", fault), run_backend("cpu"), **BFLOAT)
    monkeypatch.setattr(implementation, "_cpu_layer", faults(right)[fault])
    with pytest.raises(AssertionError):
        compare(case_for_fault("lstm", fault), run_backend("cpu"), **BFLOAT)


def test_states_are_not_rounded_within_a_sequence() -> None:
    """A cell that gains 2^-10 a step: a bfloat16 of about 1 would never change."""
    zeros = torch.zeros(4, 1, dtype=torch.bfloat16)
    bias = torch.tensor([20.0, 20.0, 2**-10, 20.0]).bfloat16()  # i, f, o open; g a little
    state = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    with ops.backend("cpu"):
        _, (_, c) = ops.lstm(
            torch.zeros(256, 1, 1, dtype=torch.bfloat16), (state, state), [zeros, zeros, bias, 0 * bias]
        )
    assert c.item() == pytest.approx(1.25)


def test_a_rows_bits_do_not_depend_on_the_batch() -> None:
    case = Case(steps=4, batch=5, hidden=70)
    inputs = make_inputs(case).to(torch.bfloat16)
    with ops.backend("cpu"), torch.no_grad():
        together = call(case, inputs)[0]
        inputs.input, inputs.states = inputs.input[:, 2:3], [s[:, 2:3] for s in inputs.states]
        alone = call(replace(case, batch=1), inputs)[0]
    assert torch.equal(alone[:, 0], together[:, 2])


def test_streaming_reads_changed_weights() -> None:
    """The short way for one step, with packed bfloat16 weights."""
    module = fastlm.nn.LSTM(6, 21).bfloat16()
    x, hx = torch.randn(1, 1, 6).bfloat16(), tuple(torch.randn(2, 1, 1, 21).bfloat16())
    with torch.no_grad():
        for change in (lambda w: w, lambda w: w.mul_(2), lambda w: w.data.neg_()):
            change(module.weight_hh_l0)
            with ops.backend("reference"):
                expected = module.double()(x.double(), tuple(s.double() for s in hx))
            module.bfloat16()
            for _ in range(2):
                output, (h_n, c_n) = module(x, hx)
                torch.testing.assert_close(output.double(), expected[0], rtol=2**-7, atol=2**-7)
                torch.testing.assert_close(c_n.double(), expected[1][1], rtol=2**-7, atol=2**-7)
                assert torch.equal(output, h_n)
                assert output.data_ptr() != h_n.data_ptr()


@pytest.mark.parametrize("variant", [{}, {"layer_norm": True, "zoneout": 0.1}], ids=str)
@pytest.mark.parametrize("kind", [fastlm.nn.LSTM, fastlm.nn.GRU])
def test_autocast_computes_in_the_weights_dtype(kind: Any, variant: dict[str, Any]) -> None:
    module = kind(5, 8, **variant).eval()
    x = torch.randn(4, 3, 5)
    expected = module(x.bfloat16().float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x.bfloat16())[0]
        found.sum().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    assert module.weight_hh_l0.grad is not None


def test_half_the_bytes_are_packed() -> None:
    from fastlm.kernels.packing import pack

    wide = torch.randn(40, 33)
    assert pack(wide.bfloat16()).nbytes * 2 == pack(wide).nbytes
    # Two values of k beside each other.
    lanes = native.CPU.require().simd_lanes()
    found = pack(wide.bfloat16()).float().view(-1, 20, 4, lanes, 2).permute(0, 1, 4, 2, 3).reshape(-1)
    assert torch.equal(found, pack(wide.bfloat16().float()))


def test_gradients_are_deterministic_and_only_where_wanted() -> None:
    case = Case(hidden=37, steps=9)
    inputs = make_inputs(case).to(torch.bfloat16)
    with ops.backend("cpu"):
        first, second = named_results(case, inputs), named_results(case, inputs)
        assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.bfloat16 for name in first)
        inputs.weights[0].requires_grad_(False)
        torch.autograd.backward(call(case, inputs), inputs.grads)
    assert inputs.weights[0].grad is None and torch.equal(inputs.weights[1].grad, first["d_weight1"])  # type: ignore[arg-type]
