"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fastlm.kernels import native

# Whether Triton's kernels run compiled or in its interpreter is decided as they are decorated, those of its own library
# at its first import, which transformers or torch.compile may be. So it is decided here, for the whole process.
# Compiling ahead of time wants a process of its own, without this variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A change is judged by the same examples each time; whoever works on the code gets fresh ones with every run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


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


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model's GGUF file: $FASTLM_TEST_GGUF, or where `fastlm pull smollm2-135m` put it."""
    path = os.environ.get("FASTLM_TEST_GGUF")
    if path:
        return Path(path)
    try:
        from fastlm.checkpoints.pull import cached
    except ImportError:
        pytest.skip("no cached model")
    found = cached("smollm2-135m")
    if found is None:
        pytest.skip("smollm2-135m is not cached: run `fastlm pull smollm2-135m`")
    return found
