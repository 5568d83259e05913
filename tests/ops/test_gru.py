"""ops.gru and ops.gru_cell."""

from __future__ import annotations

from hypothesis import given, settings
from recurrent_cases import Case, any_case, call, compare
from recurrent_suite import CellSuite, SequenceSuite


@settings(max_examples=40, deadline=None)
@given(case=any_case("gru"))
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call, floor=1e-5, least=0.1)  # little is left of 1 - h^2 where tanh is saturated


class TestGRU(SequenceSuite):
    op = "gru"


class TestGRUCell(CellSuite):
    op, gates, states = "gru_cell", 3, 1
