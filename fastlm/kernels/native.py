"""Loads the native modules and remembers why one could not be loaded.

The extension is compiled with OpenMP but linked without: its OpenMP symbols are found in the library that torch has
already loaded, so that the process has one thread pool, whatever torch's copy is called. Hence `import torch` first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

__all__ = [
    "CPU",
    "CUDA",
    "NativeModule",
    "empty",
    "forked",
    "num_threads",
    "recording",
    "recording_on_device",
    "shows_tensors",
    "values_unknown",
]

_forked = False


def _after_fork() -> None:
    # The pool's threads do not survive a fork, and libgomp would wait for them for ever.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process was forked from one that had loaded fastlm."""
    return _forked


def num_threads() -> int:
    """Threads a kernel may use: torch's setting, and 1 in a process forked from one that had a thread pool."""
    return 1 if _forked else torch.get_num_threads()


def recording() -> bool:
    """Whether the calling thread's kernel calls are being recorded for replay."""
    return values_unknown() or (CPU.module is not None and bool(CPU.module.recording()))


_on_device = threading.local()


@contextmanager
def recording_on_device() -> Iterator[None]:
    """While the calling thread records a device's work (a CUDA graph): nothing may look at what a tensor holds."""
    _on_device.recording = True
    try:
        yield
    finally:
        _on_device.recording = False


def values_unknown() -> bool:
    """Whether the calling thread is within `recording_on_device`, or torch.compile or torch.export traces it."""
    return torch.compiler.is_compiling() or getattr(_on_device, "recording", False)


class NativeModule:
    """A compiled module that may be absent: `module` or, where it is None, `error` saying why."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType | None = None
        self.error: str | None = None
        try:
            self.module = __import__(f"fastlm.{name}", fromlist=[name])
        except ModuleNotFoundError as error:
            if error.name != f"fastlm.{name}":
                raise
            self.error = f"fastlm.{name} was not built"
        except ImportError as error:
            self.error = f"fastlm.{name} could not be loaded: {error}"

    def require(self) -> ModuleType:
        """The module. Raises ImportError with the reason where it is absent."""
        if self.module is None:
            raise ImportError(self.error)
        return self.module


CPU = NativeModule("_native")
CUDA = NativeModule("_cuda")


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's data begin, as bindings take it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def shows_tensors() -> bool:
    """Whether native code can read a tensor's address, shape and strides by itself: newer versions of torch offer
    DLPack's exchange interface."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if CPU.module is None or capsule is None:
        return False
    return bool(CPU.module.set_exchange(capsule, torch.Tensor, torch.nn.Parameter))


_HUGE = 1 << 21  # bytes from which new memory asks for pages of this size


def empty(*shape: int) -> torch.Tensor:
    """float32 memory on the CPU for what a training step writes once: in huge pages where it is large.

    Touching new memory costs a fault for each page of 4 KB, about as much as filling it.
    """
    found = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
    if found.nbytes >= _HUGE:
        CPU.require().use_huge_pages(found.data_ptr(), found.nbytes)
    return found


def _force_isa_from_environment() -> None:
    level = os.environ.get("FASTLM_ISA")
    if not level or CPU.module is None:
        return
    if not CPU.module.isa_force(level):
        available = ", ".join(CPU.module.isa_available())
        raise RuntimeError(f"FASTLM_ISA={level!r} cannot run here: this processor has {available}")


def _forbid_tiles_from_environment() -> None:
    setting = os.environ.get("FASTLM_AMX", "1")
    if setting not in ("0", "1"):
        raise RuntimeError(f"FASTLM_AMX={setting!r}, expected 0 or 1")
    if CPU.module is not None:
        CPU.module.matmul_allow_tiles(setting == "1")


_force_isa_from_environment()
_forbid_tiles_from_environment()
