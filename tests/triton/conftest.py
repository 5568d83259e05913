"""Runs this folder on the GPU where there is one (then its tests are marked `gpu`), else in Triton's interpreter.

The interpreter computes with numpy, which has no bfloat16 or float8: it multiplies the bit patterns of bfloat16 as
integers, takes integers for such patterns, and rounds conversions in ways of its own. All are mended here, with torch's
conversions, so that the kernels need no special case.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker("gpu")


@pytest.fixture
def device() -> str:
    """Where the tests' tensors are."""
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter() -> Iterator[None]:
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # the modules of this folder skip themselves
        yield
        return
    names = {
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    holders = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    builder = interpreter.InterpreterBuilder
    before = interpreter._convert_float, builder.create_dot, builder.cast_impl

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in names or target not in names:
            return before[0](data, source, target, rounding)
        size = target.primitive_bitwidth // 8
        values = torch.from_numpy(np.ascontiguousarray(data)).view(names[source]).to(names[target])
        return values.view(holders[size]).numpy().view(f"uint{8 * size}").reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return before[1](self, a, b, d, precision, imprecise)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = before[2](self, source, tl.float32)
        return before[2](self, source, target)

    call_before = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Triton patches its language anew for each function called: half the time, and for nothing where the launch
        has done it. Functions of its own library reach the language by another name."""
        if any(value is tl for value in self.fn.__globals__.values()):
            return self.rewrite()(*args, **kwargs)
        return call_before(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)  # a quarter
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(builder, "create_dot", dot)
        patch.setattr(builder, "cast_impl", cast)
        yield


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
