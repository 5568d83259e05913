"""The CUDA kernels (csrc/cuda), on tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlm.kernels import native

__all__ = ["STORAGES", "addresses", "launch_cell", "stream", "unavailable", "why_not", "without_autocast"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

STORAGES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes in device memory, by their number in csrc/include/fastlm/storage.h."""


def _on_cpu() -> bool:
    """Whether the module is the one of the tests, whose device is the CPU."""
    return native.CUDA.module is not None and native.CUDA.module.on_cpu


def unavailable(device: torch.device | None = None) -> str | None:
    """Why no CUDA kernel can run in this process, or on that device; None where they can."""
    module = native.CUDA.module
    if module is None:
        return native.CUDA.error
    if not _on_cpu() and not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    return None if device is None else _device_error(module, device)


@functools.cache
def _device_error(module: ModuleType, device: torch.device) -> str | None:
    """Why kernels can't run on a device, as where none was compiled for its architecture; None where they can."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        error: str | None = module.device_error()
    return None if error is None else f"the kernels can't run on {device}: {error}"


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't take these: they have to be on one device and of one dtype that the kernels know."""
    reason = unavailable()
    if reason is not None:
        return reason
    wanted = "cpu" if _on_cpu() else "cuda"
    given = [t for t in tensors if t is not None]
    for tensor in given:
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return f"a {type(tensor).__name__}: the kernels take plain tensors"
        if tensor.device.type != wanted:
            return f"a tensor is on {tensor.device}, not on a CUDA device"
        if tensor.device != given[0].device:
            return f"a tensor is on {tensor.device}, another on {given[0].device}; they have to be on one CUDA device"
        if tensor.dtype != given[0].dtype or tensor.dtype not in STORAGES:
            return f"a tensor is {tensor.dtype}; the kernels take one of float32, float16 and bfloat16"
    return unavailable(given[0].device)


def stream(device: torch.device) -> int:
    """Torch's current stream of the device."""
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream


def addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Those that are given, by name. The tensors are contiguous; torch frees memory in the order of the stream."""
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), name
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def launch_cell(kernel: str, h: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """A recurrent cell's kernel for rows like those of h [B, H], on its device and torch's stream there."""
    with torch.cuda.device_of(h):
        function = getattr(native.CUDA.require(), kernel)
        function(STORAGES[h.dtype], *h.shape, addresses(tensors), stream(h.device))


def without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Has torch's products keep the dtype of the tensors, which is the one that kernels are told. Autocast has them
    give half precision, in the backward too where it is called within."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.autocast("cpu" if _on_cpu() else "cuda", enabled=False):
            return function(*args, **kwargs)

    return run
