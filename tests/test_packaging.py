"""What the wheel promises: no torch in the extension, one OpenMP runtime, kernels that survive a fork."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastlm.kernels import native

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def test_native_is_built() -> None:
    assert native.CPU.module is not None, native.CPU.error


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_undefined_torch_symbol() -> None:
    path = native.CPU.require().__file__
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    assert "Py" in symbols.stdout
    for word in ("torch", "c10", "aten", "3at_"):
        assert word not in symbols.stdout.lower()


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_libgomp_is_mapped() -> None:
    code = """
import fastlm.ops, torch
from fastlm.kernels import native
native.CPU.require()
torch.ones(1000, 1000).sum()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
print(len(paths), sorted(paths))
"""
    done = _run(code)
    assert done.stdout.startswith("1 "), done.stdout + done.stderr


def test_importing_fastlm_is_cheap() -> None:
    done = _run("import fastlm, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@needs_native
def test_forced_isa() -> None:
    report = "from fastlm.kernels import native; print(native.CPU.require().isa_active())"
    for level in native.CPU.require().isa_available():
        assert _run(report, FASTLM_ISA=level).stdout.strip() == level
    refused = _run(report, FASTLM_ISA="avx1024")
    assert refused.returncode != 0
    assert "FASTLM_ISA='avx1024' cannot run here: this processor has baseline" in refused.stderr


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forking_after_use_does_not_hang() -> None:
    code = """
import os, torch
from fastlm import ops
torch.set_num_threads(2)
def work():
    logits = torch.randn(8, 50257)
    return ops.sample(logits, seed=1)
work(); torch.ones(1000, 1000) @ torch.ones(1000, 1000)
child = os.fork()
if child == 0:
    work()
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
    assert _run(code).stdout.strip() == "0"


@needs_native
def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert native.num_threads() == 1
    finally:
        torch.set_num_threads(before)
