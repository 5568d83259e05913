"""Kernels alone, by pytest-benchmark: `pytest bench/kernels --benchmark-only --benchmark-group-by=func,param:shape`.

Each case runs once per implementation that can serve it; before it is timed, its result is compared with the
reference's in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlm
from fastlm import ops

Race = Callable[..., None]


@pytest.fixture(params=["cpu", "torch", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    """The backend that is timed."""
    return str(request.param)


@pytest.fixture
def race(benchmark: Any, implementation: str) -> Race:
    """race(op name, *args, moved=bytes read, error=allowed, **kwargs) times the op by the chosen implementation."""

    def run(name: str, *args: Any, moved: float | None = None, error: float = 1e-5, **kwargs: Any) -> None:
        reasons = dict(fastlm.explain(name, *args, **kwargs).reasons)
        if implementation not in reasons:
            pytest.skip(f"{name} has no implementation {implementation!r}")
        if reasons[implementation] is not None:
            pytest.skip(f"{implementation}: {reasons[implementation]}")
        function = getattr(ops, name)
        with fastlm.backend("reference"):
            want = tree_leaves(function(*tree_map(_double, args), **tree_map(_double, kwargs)))
        with torch.no_grad(), fastlm.backend(implementation):
            for got, exact in zip(tree_leaves(function(*args, **kwargs)), want, strict=True):
                off = float((got - exact).double().norm() / exact.double().norm().clamp_min(1e-30))
                assert off <= error, f"{name} is off by {off:.1e} of its norm, allowed {error:.0e}"
            benchmark(function, *args, **kwargs)
        if moved is not None and benchmark.stats is not None:
            benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9

    return run


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
