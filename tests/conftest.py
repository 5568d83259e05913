"""Fixtures every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastlm.kernels import native


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(params=native.CPU.module.isa_available() if native.CPU.module else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction-set level that this processor has."""
    module = native.CPU.require()
    before = module.isa_active()
    assert module.isa_force(request.param)
    yield request.param
    module.isa_force(before)
