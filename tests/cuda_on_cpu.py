"""fastlm's CUDA module over csrc/tests/shim, whose device is the CPU: the kernels, their launchers, the bindings and
the Python wrappers as they run on a GPU, on any machine that has a C++ compiler."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from fastlm.kernels import cuda, native

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shutil.which("g++")


@functools.cache
def module() -> ModuleType:
    """Compiles the module, instrumented as in csrc/tests/CMakeLists.txt; it takes some seconds."""
    if COMPILER is None:
        pytest.skip("there is no g++")
    pybind11 = pytest.importorskip("pybind11")
    folder = Path(tempfile.mkdtemp(prefix="fastlm-cuda-on-cpu-"))
    flags = ["-std=gnu++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    includes = [CSRC / "include", CSRC / "cuda", CSRC / "tests" / "shim", pybind11.get_include()]
    flags += [f"-I{path}" for path in (*includes, sysconfig.get_path("include"))]
    logged, log = ("-fsanitize=thread", "-fno-threadsafe-statics"), ("-DFASTLM_SHIM_LOGS",)
    sources = {
        **dict.fromkeys(sorted((CSRC / "cuda").glob("*.cu")), logged),
        **dict.fromkeys(sorted((CSRC / "tests" / "shim").glob("*.cpp")), log),
        CSRC / "python" / "cuda_module.cpp": ("-DFASTLM_ON_CPU",),
    }
    objects = [folder / f"{source.stem}.o" for source in sources]
    runs = [
        subprocess.Popen([COMPILER, *flags, *extra, "-x", "c++", "-c", source, "-o", target], stderr=subprocess.PIPE)
        for (source, extra), target in zip(sources.items(), objects, strict=True)
    ]
    for run in runs:
        errors = run.communicate()[1].decode()
        assert run.returncode == 0, errors
    library = folder / "_cuda_on_cpu.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    shutil.rmtree(folder)
    return loaded


@contextmanager
def device(
    *, seed: int = 0, log: bool = True, multiprocessors: int = 3, shared: int = 64 << 10
) -> Iterator[ModuleType]:
    """The shim in place of the CUDA module.

    Args:
        seed: shuffles the order in which threads run; 0: in order.
        log: every access is checked, for races and for being within a tensor that the wrapper named.
        multiprocessors, shared: of the device, the latter in bytes a block.
    """
    shim = module()
    before = native.CUDA.module, cuda.addresses
    known: list[Tensor] = []

    def addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
        shim.forget_all()
        known.clear()
        for name, tensor in tensors.items():
            if tensor is not None:
                known.append(tensor)
                shim.watch(name, tensor.data_ptr(), tensor.nbytes)
        return before[1](tensors)

    native.CUDA.module = shim
    cuda.addresses = addresses
    shim.set_options(seed, log, multiprocessors, shared)
    try:
        yield shim
    finally:
        native.CUDA.module, cuda.addresses = before
        shim.forget_all()
