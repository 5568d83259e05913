"""ops.lstm and ops.lstm_cell."""

from __future__ import annotations

from hypothesis import given, settings
from recurrent_cases import Case, any_case, call, compare
from recurrent_suite import CellSuite, SequenceSuite


@settings(max_examples=40, deadline=None)
@given(case=any_case("lstm"))
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call)


class TestLSTM(SequenceSuite):
    op = "lstm"


class TestLSTMCell(CellSuite):
    op, gates, states = "lstm_cell", 4, 2
