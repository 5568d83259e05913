"""ops.lstm and ops.lstm_cell, the native kernel above all."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from recurrent_cases import (
    Case,
    any_case,
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
    run_layer,
)
from recurrent_suite import CellSuite, SequenceSuite
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native

implementation: Any = sys.modules["fastlm.ops.lstm"]  # the attribute of that name is the function
needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


@settings(max_examples=40, deadline=None)
@given(case=any_case("lstm"))
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call, floor=1e-5)


class TestLSTM(SequenceSuite):
    op = "lstm"

    def test_refuses_a_projection_that_is_not_smaller(self) -> None:
        case = Case(proj_size=7)
        with pytest.raises(ValueError, match=r"^lstm: proj_size is 7, expected less than the hidden size, 7"):
            call(case, make_inputs(case))

    def test_refuses_weights_that_are_no_whole_gates(self) -> None:
        x, h, c, w_ih, w_hh = (torch.randn(s) for s in ((2, 3, 5), (1, 3, 7), (1, 3, 7), (30, 5), (30, 7)))
        with pytest.raises(ValueError, match=r"^lstm: weights\[0\] is float32 \[30, 5\].*a multiple of 4 rows"):
            ops.lstm(x, (h, c), [w_ih, w_hh], bias=False)

    def test_refuses_a_dropout_that_is_no_probability(self) -> None:
        inputs = make_inputs(Case())
        with pytest.raises(ValueError, match=r"^lstm: dropout is 1\.5"):
            ops.lstm(inputs.input, tuple(inputs.states), inputs.weights, dropout=1.5, training=True)


class TestLSTMCell(CellSuite):
    op, gates, states = "lstm_cell", 4, 2

    def test_native_at_every_level(self, isa: str) -> None:
        with poisoned_memory():
            for batch, width, hidden in ((1, 1, 1), (1, 17, 33), (3, 5, 7), (4, 16, 8), (9, 40, 64)):
                for bias in (True, False):
                    self.compare(self.tensors(batch, width, hidden, bias), "cpu")

    def test_is_a_step_of_the_sequence(self, isa: str) -> None:
        """Bit for bit, so that prefill and decoding agree."""
        x, h, c, *weights = (t.float() for t in self.tensors(3, 9, 21))
        output, (h_n, c_n) = ops.lstm(x[None], (h[None], c[None]), weights)
        h_1, c_1 = ops.lstm_cell(x, (h, c), *weights)
        assert torch.equal(h_1, h_n[0])
        assert torch.equal(c_1, c_n[0])
        assert torch.equal(output, h_n)


def test_native_agrees_at_every_level(isa: str) -> None:
    with poisoned_memory():
        for case in cases("lstm"):
            compare(case, run_backend("cpu"))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(case=any_case("lstm"))
def test_agrees_on_any_shape_at_length(case: Case) -> None:
    compare(case, call, floor=1e-5)


@needs_native
@pytest.mark.parametrize("fault", faults(lambda *_: None))  # type: ignore[arg-type, return-value]
def test_the_comparison_refuses_faults(fault: str) -> None:
    """The very comparison by which the kernel is judged, with the kernel spoiled."""
    layer = implementation._cpu_layer
    compare(case_for_fault("lstm", fault), run_layer(layer))
    with pytest.raises(AssertionError):
        compare(case_for_fault("lstm", fault), run_layer(faults(layer)[fault]))


@needs_native
@pytest.mark.parametrize("index", range(7))
def test_the_comparison_refuses_a_wrong_gradient(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient of the kernel in turn, of the input, the weights, and the states, off by one part in a thousand."""
    right = implementation.kernel.layer_backward

    def wrong(*args: Any) -> Any:
        grads = list(right(*args))
        position = index if index < 5 else index + 1  # past the projection, absent here
        grads[position] = grads[position] * 1.001
        return grads

    monkeypatch.setattr(implementation.kernel, "layer_backward", wrong)
    with pytest.raises(AssertionError):
        compare(Case(), call)


@needs_native
def test_a_rows_result_depends_on_no_other_row() -> None:
    """Packed with longer rows or alone, in a batch of one or of five: the same bits. But for one step alone, which is
    multiplied in floats."""
    case = Case(lengths=(9, 7, 7, 4, 2), bidirectional=True, num_layers=2, hidden=21)
    inputs = make_inputs(case).to(torch.float32)
    assert inputs.batch_sizes is not None
    with torch.no_grad():
        output, h_n, c_n = call(case, inputs)
        starts = [0, *inputs.batch_sizes.cumsum(0).tolist()]
        for row, length in enumerate(case.lengths or ()):
            of_row = [starts[t] + row for t in range(length)]
            alone = replace(inputs, input=inputs.input[of_row][:, None], batch_sizes=None)
            alone.states = [s[:, row : row + 1] for s in inputs.states]
            found = call(replace(case, lengths=None, steps=length, batch=1), alone)
            assert torch.equal(found[0][:, 0], output[of_row])
            assert torch.equal(found[1][:, 0], h_n[:, row])
            assert torch.equal(found[2][:, 0], c_n[:, row])


@needs_native
def test_the_thread_count_changes_nothing() -> None:
    case = Case(hidden=70, width=33, batch=5, steps=7, bidirectional=True)
    inputs = make_inputs(case).to(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = named_results(case, inputs)
        torch.set_num_threads(2)
        two = named_results(case, inputs)
    finally:
        torch.set_num_threads(before)
    for name in ("output", "h_n", "c_n", "d_state0", "d_state1"):
        assert torch.equal(one[name], two[name]), name


@needs_native
def test_sees_weights_that_changed() -> None:
    """The kernel keeps packed weights from call to call; an optimizer's step and load_state_dict must show."""
    case = Case()
    inputs = make_inputs(case).to(torch.float32)
    before = inference(case, inputs)["output"]
    for change in (lambda w: w.mul_(2), lambda w: w.copy_(torch.randn_like(w)), lambda w: w.data.neg_()):
        with torch.no_grad():
            for weight in inputs.weights:
                change(weight)
        after = inference(case, inputs)["output"]
        assert not torch.equal(before, after)
        with ops.backend("reference"):
            torch.testing.assert_close(after, inference(case, inputs)["output"])
        before = after


@needs_native
def test_a_second_derivative_is_refused_with_the_way_out() -> None:
    case = Case(steps=2)
    inputs = make_inputs(case).to(torch.float32)
    (grad,) = torch.autograd.grad(call(case, inputs)[0].square().sum(), inputs.input, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"lstm: the native backward has no derivative.*backend\('reference'\)"
    ):
        grad.square().sum().backward()
    with ops.backend("reference"):
        (grad,) = torch.autograd.grad(call(case, inputs)[0].square().sum(), inputs.input, create_graph=True)
    grad.square().sum().backward()
    assert inputs.weights[0].grad is not None


@needs_native
def test_explain_gives_the_reasons_against_the_kernel() -> None:
    inputs = make_inputs(Case())

    def reasons(dtype: torch.dtype) -> Any:
        given = inputs.to(dtype)
        return ops.explain("lstm", given.input, tuple(given.states), given.weights)

    assert reasons(torch.float32).chosen == "cpu"
    assert dict(reasons(torch.float64).reasons)["cpu"].startswith("a Tensor of float64 [5, 3, 6] on cpu")
    with ops.backend("cpu"), pytest.raises(NotImplementedError, match="float64"):
        call(Case(), inputs)


@needs_native
def test_transforms_that_cannot_see_the_kernel_do_not_get_it() -> None:
    case = Case(steps=2)
    inputs = make_inputs(case).to(torch.float32)

    def total(x: Tensor) -> Tensor:
        return call(case, replace(inputs, input=x))[0].square().sum()

    x, direction = inputs.input.detach(), torch.randn_like(inputs.input)
    expected = torch.autograd.grad(total(inputs.input), inputs.input)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    _, derivative = torch.func.jvp(total, (x,), (direction,))
    torch.testing.assert_close(derivative, (expected * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = total(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, derivative)
    inputs.states = [s.detach() for s in inputs.states]
    inputs.weights = [w.detach() for w in inputs.weights]
    traced = torch.jit.trace(total, (x,), check_trace=False)
    torch.testing.assert_close(traced(direction), total(direction))
