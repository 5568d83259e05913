"""What holds for lstm, gru and rnn alike: agreement with the reference, custom ops, errors, determinism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from recurrent_cases import (
    SEQUENCES,
    Case,
    Inputs,
    call,
    cases,
    compare,
    inference,
    make_inputs,
    named_results,
    run_backend,
    run_reference,
)

from fastlm import ops


class SequenceSuite:
    """Inherit, and name the op."""

    op: ClassVar[str]

    @pytest.mark.parametrize("name", ["torch", "reference"])
    def test_agrees_with_the_reference(self, name: str) -> None:
        for case in cases(self.op):
            compare(case, run_backend(name))

    def test_accepts_any_strides(self) -> None:
        case = Case(op=self.op, num_layers=2, bidirectional=True)
        inputs = make_inputs(case)
        expected = run_reference(case, inputs)
        inputs.input = inputs.input.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        inputs.states = [s.transpose(0, 2).contiguous().transpose(0, 2) for s in inputs.states]
        inputs.weights = [
            w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in inputs.weights
        ]
        assert not inputs.input.is_contiguous()
        for name, result in inference(case, inputs.to(torch.float32)).items():
            index = ["output", "h_n", "c_n"].index(name)
            torch.testing.assert_close(result.double(), expected[index].detach(), rtol=1e-5, atol=1e-5)

    def test_is_deterministic(self) -> None:
        case = Case(op=self.op, num_layers=2, bidirectional=True, hidden=37, steps=20)
        inputs = make_inputs(case).to(torch.float32)
        first, second = named_results(case, inputs), named_results(case, inputs)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_gradients_only_where_wanted(self) -> None:
        case = Case(op=self.op)
        inputs = make_inputs(case).to(torch.float32)
        expected = named_results(case, inputs)
        inputs.input.requires_grad_(False)
        inputs.weights[0].requires_grad_(False)
        output = call(case, inputs)
        torch.autograd.backward(output, inputs.grads)
        assert inputs.input.grad is None
        assert inputs.weights[0].grad is None
        torch.testing.assert_close(inputs.weights[1].grad, expected["d_weight1"])

    def test_dropout_acts_in_training_alone_and_follows_the_seed(self) -> None:
        case = Case(op=self.op, num_layers=2, hidden=32)
        inputs = make_inputs(case).to(torch.float32)
        hx = tuple(inputs.states) if self.op == "lstm" else inputs.states[0]

        def run(training: bool, seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            function = getattr(ops, self.op)
            return function(inputs.input, hx, inputs.weights, dropout=0.5, training=training, **case.kwargs())[0]

        assert torch.equal(run(False, 0), run(False, 1))
        assert torch.equal(run(False, 0), call(case, inputs)[0])
        assert torch.equal(run(True, 0), run(True, 0))
        assert not torch.equal(run(True, 0), run(True, 1))

    @pytest.mark.parametrize(
        "case",
        [
            Case(steps=3, batch=2, width=3, hidden=4, num_layers=2, bidirectional=True),
            Case(steps=3, batch=2, width=3, hidden=4, bias=False, batch_first=True),
            Case(lengths=(3, 2), width=3, hidden=4),
        ],
        ids=str,
    )
    def test_opcheck(self, case: Case) -> None:
        case = replace(case, op=self.op)
        inputs = make_inputs(case).to(torch.float32)
        tensors = (inputs.input, inputs.states, inputs.weights)
        rest = (inputs.batch_sizes, case.num_layers, case.bidirectional, case.batch_first, case.bias, *case.extra)
        torch.library.opcheck(SEQUENCES[self.op].custom, (*tensors, *rest))
        detached = (inputs.input.detach(), [s.detach() for s in inputs.states], [w.detach() for w in inputs.weights])
        wanted = [index % 3 != 1 for index in range(1 + len(inputs.states) + len(inputs.weights))]
        vjp = getattr(torch.ops.fastlm, f"{self.op}_vjp").default
        torch.library.opcheck(vjp, (inputs.grads, wanted, *detached, *rest))

    def test_explain_names_every_implementation(self) -> None:
        case = Case(op=self.op)
        inputs = make_inputs(case).to(torch.float64)
        hx = tuple(inputs.states) if self.op == "lstm" else inputs.states[0]
        explanation = ops.explain(self.op, inputs.input, hx, inputs.weights, **case.kwargs())
        assert explanation.chosen == "torch"
        assert {name for name, _ in explanation.reasons} >= {"torch", "reference"}

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda i: setattr(i, "input", i.input[0]), r"input is float64 \[3, 6\].* expected 3 dimensions"),
            (lambda i: setattr(i, "input", i.input[:0]), "input is .* at least one time step"),
            (lambda i: setattr(i, "input", i.input[..., :5]), r"weights\[0\] is float64 .*expected shape \[\d+, 5\]"),
            (lambda i: setattr(i, "input", i.input.float()), r"weights\[0\] is float64 .*the input torch.float32"),
            (lambda i: i.weights.pop(), "weights has 3 tensors, expected 4"),
            (lambda i: i.weights.__setitem__(3, i.weights[3][:-1]), r"weights\[3\] is .*expected shape"),
            (lambda i: i.states.__setitem__(0, i.states[0][:, :2]), r"h0 is float64 \[1, 2, 7\].*\[1, 3, 7\]"),
            (lambda i: setattr(i, "batch_sizes", torch.tensor([3, 2])), "input is .*expected 2 dimensions with"),
        ],
    )
    def test_errors_name_the_culprit(self, spoil: Any, message: str) -> None:
        case = Case(op=self.op)
        inputs = make_inputs(case)
        spoil(inputs)
        with pytest.raises(ValueError, match=f"^{self.op}: {message}"):
            call(case, inputs)

    def test_refuses_no_layers_and_states_of_other_dimensions(self) -> None:
        inputs = make_inputs(Case(op=self.op))
        with pytest.raises(ValueError, match=f"^{self.op}: num_layers is 0, expected at least 1"):
            call(Case(op=self.op, num_layers=0), inputs)
        packed = make_inputs(Case(op=self.op, lengths=(2, 1)))
        packed.states[0] = packed.states[0][0]
        with pytest.raises(ValueError, match=rf"^{self.op}: h0 is float64 \[2, 7\] .*expected shape \[1, B, 7\]"):
            call(Case(op=self.op), packed)

    @pytest.mark.parametrize("sizes", [[3, 4, 2], [4, 4, 1], [3, 3, 3, 0], [3, 3], []])
    def test_refuses_inconsistent_batch_sizes(self, sizes: list[int]) -> None:
        case = Case(op=self.op, lengths=(3, 3, 3))
        inputs = make_inputs(case)
        inputs.batch_sizes = torch.tensor(sizes, dtype=torch.int64)
        with pytest.raises(ValueError, match=rf"^{self.op}: batch_sizes \["):
            call(case, inputs)

    def test_an_empty_batch_gives_empty_results(self) -> None:
        case = Case(op=self.op, batch=0, num_layers=2, bidirectional=True)
        results = call(case, make_inputs(case).to(torch.float32))
        assert [list(r.shape) for r in results] == [[5, 0, 14]] + [[4, 0, 7]] * (len(results) - 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_runs(self, dtype: torch.dtype) -> None:
        case = Case(op=self.op, num_layers=2)
        inputs = make_inputs(case).to(dtype)
        exact = run_reference(case, inputs.to(torch.float64))[0]
        result = call(case, inputs)[0]
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=0.05, atol=0.05)

    def test_autocast_takes_inputs_of_another_dtype(self) -> None:
        case = Case(op=self.op)
        inputs = make_inputs(case).to(torch.float32)
        exact = run_reference(case, inputs.to(torch.float64))[0]
        inputs = Inputs(inputs.input.bfloat16(), inputs.states, inputs.weights, None, [])
        with torch.autocast("cpu", torch.bfloat16):
            result = call(case, inputs)[0]
        torch.testing.assert_close(result.double(), exact, rtol=0.05, atol=0.05)


class CellSuite:
    """The same for a cell."""

    op: ClassVar[str]
    gates: ClassVar[int]
    states: ClassVar[int]

    def tensors(self, batch: int = 3, width: int = 5, hidden: int = 7, bias: bool = True) -> list[Any]:
        """input, states, w_ih, w_hh, b_ih, b_hh in float64."""
        rows = self.gates * hidden
        shapes = [(batch, width), *[(batch, hidden)] * self.states, (rows, width), (rows, hidden)]
        found: list[Any] = [torch.randn(*s, dtype=torch.float64) for s in shapes]
        for weight in found[-2:]:
            weight /= weight.shape[1] ** 0.5
        return found + [torch.randn(rows, dtype=torch.float64) if bias else None for _ in range(2)]

    def call(self, tensors: list[Any], **kwargs: Any) -> Any:
        states = tensors[1 : 1 + self.states]
        hx = tuple(states) if self.states > 1 else states[0]
        return getattr(ops, self.op)(tensors[0], hx, *tensors[1 + self.states :], **kwargs)

    def custom_args(self, tensors: list[Any]) -> tuple[Any, ...]:
        return tuple(tensors)

    def results(self, tensors: list[Any]) -> list[torch.Tensor]:
        """Outputs, and gradients of the sum of their squares."""
        leaves = [t for t in tensors if t is not None]
        outputs = torch.utils._pytree.tree_leaves(self.call(tensors))
        return outputs + list(torch.autograd.grad([o.square().sum() for o in outputs], leaves))

    def cast(self, tensors: list[Any], dtype: torch.dtype) -> list[Any]:
        return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]

    def compare(self, tensors: list[Any], name: str | None) -> None:
        from tolerance import assert_close_to_reference

        single = self.cast(tensors, torch.float32)
        with ops.backend("reference"):
            exact = self.results(self.cast(single, torch.float64))
        with ops.backend("torch"):
            same_dtype = self.results(single)
        if name is None:
            found = self.results(single)
            quiet = torch.utils._pytree.tree_leaves(self.call([None if t is None else t.detach() for t in single]))
        else:
            with ops.backend(name):
                found = self.results(single)
                quiet = torch.utils._pytree.tree_leaves(self.call([None if t is None else t.detach() for t in single]))
        for fast, near, ref in zip(found, same_dtype, exact, strict=True):
            assert_close_to_reference(fast.detach(), near.detach(), ref.detach())
        for fast, near, ref in zip(quiet, same_dtype, exact, strict=False):
            assert_close_to_reference(fast, near.detach(), ref.detach())

    @pytest.mark.parametrize("bias", [True, False])
    def test_agrees_with_the_reference(self, bias: bool) -> None:
        for batch, width, hidden in ((1, 1, 1), (1, 17, 33), (3, 5, 7), (4, 16, 8), (0, 3, 4)):
            self.compare(self.tensors(batch, width, hidden, bias), None)

    def test_opcheck(self) -> None:
        custom = getattr(torch.ops.fastlm, self.op).default
        for bias in (True, False):
            tensors = self.cast(self.tensors(2, 3, 4, bias), torch.float32)
            torch.library.opcheck(custom, self.custom_args(tensors))

    @pytest.mark.parametrize(("index", "name"), [(-1, "b_hh"), (-2, "b_ih"), (-3, "w_hh"), (-4, "w_ih"), (1, "h")])
    def test_errors_name_the_culprit(self, index: int, name: str) -> None:
        tensors = self.tensors()
        tensors[index] = tensors[index][:-1]
        with pytest.raises(ValueError, match=f"^{self.op}: {name} is float64 .*expected shape"):
            self.call(tensors)
        tensors = self.tensors()
        tensors[index] = tensors[index].float()
        with pytest.raises(ValueError, match=f"^{self.op}: {name} is float32 .*the input torch.float64"):
            self.call(tensors)
        with pytest.raises(ValueError, match=f"^{self.op}: input is "):
            self.call([self.tensors()[0][0], *self.tensors()[1:]])
