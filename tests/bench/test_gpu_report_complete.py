"""Every kernel that a shipped path launches is compiled ahead of time, and in the record."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import static
from fastlm.kernels.triton.shipped import TARGETS

_ROOT = Path(__file__).parents[2]


def _launched(folder: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """By module of Triton kernels: those that no other kernel of any module calls, so that they must be launched; and
    all."""
    jits: dict[str, set[str]] = {}
    called: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any("jit" in name.split("(")[0] for name in decorators):
                jits.setdefault(path.stem, set()).add(node.name)
                called |= {ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)}
    return {module: names - called for module, names in jits.items()}, jits


def _python(kernel: Any) -> Any:
    """The function under `triton.jit`, which may be the interpreter's, and autotune."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_that_is_launched_is_in_the_report() -> None:
    """A kernel that a path launches and no `shipped()` names would be compiled on somebody's GPU for the first time."""
    launched, jits = _launched(_ROOT / "fastlm" / "kernels" / "triton")
    assert sum(map(len, jits.values())) > sum(map(len, launched.values())) > 10
    functions = [_python(s.kernel) for _, s in static.discover()]
    shipped = {(f.__module__.split(".")[-1], f.__name__) for f in functions}
    assert {(module, name) for module, names in launched.items() for name in names} == shipped


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_configuration_is_in_the_record_and_sound() -> None:
    record = json.loads((_ROOT / "bench" / "results" / "gpu-static.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["kernel"], row["target"]) for row in record}
    missing = {(s.name, target) for _, s in static.discover() for target in s.targets} - found
    assert not missing, "run `python -m bench gpu-static`"
    assert [row["kernel"] for row in record if row["problems"]] == []


def test_every_cuda_kernel_is_in_the_record() -> None:
    """nvcc compiles whole files, so none can be left out; the record has to be of these sources."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (_ROOT / "csrc" / "cuda").glob("*.cu*"))
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", sources))
    assert "lstm_sequence_backward_kernel" in kernels and len(kernels) >= 8
    assert sources.count("__global__") == len(kernels)
    record = json.loads((_ROOT / "bench" / "results" / "gpu-static.json").read_text(encoding="utf-8"))["rows"]
    rows = {(row["kernel"].split("<")[0], row["target"]) for row in record if row["kernel"].split("<")[0] in kernels}
    assert rows == {(kernel, target) for kernel in kernels for target in TARGETS if target.startswith("sm_")}
