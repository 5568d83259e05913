"""The comparison itself must be able to fail."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_reference


def test_accepts_the_rounding_of_the_dtype() -> None:
    ref = torch.randn(50, dtype=torch.float64)
    assert_close_to_reference(ref.float(), ref.float(), ref)


@pytest.mark.parametrize(
    "fault", [torch.zeros_like, lambda t: t * 1.0001, lambda t: t.roll(1), lambda t: t * torch.nan]
)
def test_refuses_wrong_results(fault: object) -> None:
    ref = torch.randn(50, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_to_reference(fault(ref.float()), ref.float(), ref)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        assert_close_to_reference(fault(1e-8 * ref.float()), 1e-8 * ref.float(), 1e-8 * ref)  # type: ignore[operator]
