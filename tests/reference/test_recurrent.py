"""The references against torch's own operators in float64, and their derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_cases import (
    SEQUENCES,
    Case,
    Inputs,
    call,
    case_for_fault,
    cases,
    faults,
    make_inputs,
    named_results,
    run_layer,
    run_reference,
    run_torch,
)
from torch import _VF, Tensor

from fastlm import ops
from fastlm.reference import gru, lstm, rnn
from fastlm.reference.recurrent import layer_of


def assert_same(case: Case, run: Any) -> None:
    inputs = make_inputs(case).to(torch.float64)
    expected = named_results(case, inputs, run_torch)
    for name, result in named_results(case, inputs, run).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [case for op in SEQUENCES for case in cases(op)], ids=str)
def test_sequences_agree_with_torch(case: Case) -> None:
    assert_same(case, run_reference)


@pytest.mark.parametrize("fault", faults(lambda *_: None))  # type: ignore[arg-type, return-value]
def test_the_comparison_refuses_faults(fault: str) -> None:
    layer = layer_of(lstm._step)
    assert_same(case_for_fault("lstm", fault), run_layer(layer))
    with pytest.raises(AssertionError):
        assert_same(case_for_fault("lstm", fault), run_layer(faults(layer)[fault]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"])
def test_cells_agree_with_torch(name: str, bias: bool) -> None:
    kind = name.split("_")[0]
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    states = [torch.randn(3, 5, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1)]
    x, w_ih, w_hh = (torch.randn(*s, dtype=torch.float64) for s in ((3, 4), (gates * 5, 4), (gates * 5, 5)))
    biases = [torch.randn(gates * 5, dtype=torch.float64) if bias else None for _ in range(2)]
    expected = getattr(_VF, name)(x, states if kind == "lstm" else states[0], w_ih, w_hh, *biases)
    extra = [name.split("_")[1]] if kind == "rnn" else []
    found = {"lstm": lstm.lstm_cell, "gru": gru.gru_cell, "rnn": rnn.rnn_cell}[kind](
        x, *states, w_ih, w_hh, *biases, *extra
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=3, batch=2, width=2, hidden=3),
        Case(steps=2, batch=2, width=2, hidden=3, proj_size=2, bidirectional=True),
        Case(lengths=(3, 1), width=2, hidden=2, num_layers=2),
        Case(op="gru", lengths=(2, 1), width=2, hidden=2, bidirectional=True),
        Case(op="rnn", steps=3, batch=2, width=2, hidden=3),
    ],
    ids=str,
)
def test_gradients(case: Case) -> None:
    inputs = make_inputs(case).to(torch.float64)
    leaves = [inputs.input, *inputs.states, *inputs.weights]
    count = len(inputs.states)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = Inputs(tensors[0], list(tensors[1 : 1 + count]), list(tensors[1 + count :]), inputs.batch_sizes, [])
        return tuple(run_reference(case, given))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("op", SEQUENCES)
def test_dropout_is_torchs_own_under_the_same_seed(op: str) -> None:
    case = Case(op=op, num_layers=3, bidirectional=True, steps=20, batch=8, hidden=16)
    inputs = make_inputs(case)
    layout = (inputs.batch_sizes, case.num_layers, case.bidirectional, case.batch_first, case.bias, 0.4, *case.extra)
    results = []
    for name in ("reference", "torch"):
        torch.manual_seed(7)
        with ops.backend(name):
            results.append(SEQUENCES[op].op(inputs.input, tuple(inputs.states), inputs.weights, *layout)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)
    assert (results[0] - call(case, inputs)[0]).abs().max() > 0.1, "nothing was dropped"


def test_dropout_zeroes_the_given_share_between_layers_only() -> None:
    """A ReLU network of identities with the input 1 shows the mask itself: 0 or 1 / (1 - p)."""
    eye, zero = torch.eye(100), torch.zeros(100, 100)
    x = torch.ones(50, 4, 100)
    state = torch.zeros(2, 4, 100)
    output, (h_n,) = rnn.rnn(x, (state,), [eye, zero] * 2, None, 2, False, False, False, 0.3, "relu")
    assert output.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (output == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(h_n[0], torch.ones(4, 100)), "the state of a layer is not dropped"
