"""ops.rnn and ops.rnn_cell."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from recurrent_cases import Case, any_case, call, compare
from recurrent_suite import CellSuite, SequenceSuite

from fastlm import ops


@settings(max_examples=40, deadline=None)
@given(case=any_case("rnn"))
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call, floor=1e-5, least=0.1)  # little is left of 1 - h^2 where tanh is saturated


class TestRNN(SequenceSuite):
    op = "rnn"


class TestRNNCell(CellSuite):
    op, gates, states = "rnn_cell", 1, 1

    def custom_args(self, tensors: list[Any]) -> tuple[Any, ...]:
        return (*tensors, "relu")

    @pytest.mark.parametrize("op", ["rnn", "rnn_cell"])
    def test_refuses_an_unknown_nonlinearity(self, op: str) -> None:
        x, h, w_ih, w_hh, *_ = self.tensors()
        args = (w_ih, w_hh) if op == "rnn_cell" else ([w_ih, w_hh],)
        with pytest.raises(ValueError, match=f"^{op}: nonlinearity is 'gelu', expected 'tanh' or 'relu'"):
            getattr(ops, op)(x, h, *args, nonlinearity="gelu")
