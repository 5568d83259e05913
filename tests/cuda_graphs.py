"""CUDA graphs as torch has them, emulated on CPU tensors: what is recorded does not run, and a replay has no Python.

As on a device, recording leaves memory as it was and what it allocates without content, a replay does the recorded
operations on the very same tensors, and looking at a value while recording fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CudaGraph", "install"]

aten = torch.ops.aten
_LOOKS = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.equal.default}


class CudaGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def replay(self) -> None:
        assert _current, "replayed on whatever device is the current one"
        type(self).replays += 1
        for func, args, kwargs, outputs in self.calls:
            found = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, new in zip(outputs, found, strict=True):
                if output.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    output.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CudaGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        names = [a.name for a in func._schema.arguments]
        for name in written:
            tensor = kwargs[name] if name in kwargs else args[names.index(name)]
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before.setdefault(tensor.untyped_storage().data_ptr(), (whole, whole.clone()))
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.graph.calls.append((func, args, kwargs, outputs))
        aliases = any(value.alias_info is not None for value in func._schema.returns)
        if not aliases:
            self.made += outputs
        return result


_current: list[torch.device] = []  # the innermost torch.cuda.device(...)


@contextmanager
def _device(device: torch.device) -> Iterator[None]:
    _current.append(torch.device(device))
    try:
        yield
    finally:
        _current.pop()


def _recording(graph: CudaGraph, *, stream: Any, capture_error_mode: str) -> Any:
    assert stream.device == _current[-1] and capture_error_mode == "thread_local"

    @contextmanager
    def context() -> Iterator[None]:
        recorder = _Recorder(graph)
        try:
            with recorder:
                yield
        finally:
            for whole, before in recorder.before.values():
                whole.copy_(before)
            for tensor in recorder.made:  # memory that nothing was written to
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    return context()


class _Stream:
    def __init__(self, *_: object) -> None:
        assert _current, "a stream of whatever device is the current one"
        self.device = _current[-1]

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, _Stream) and other.device == self.device


def install(monkeypatch: pytest.MonkeyPatch) -> type[CudaGraph]:
    """Puts the emulation into `torch.cuda`; returns a class that counts its replays."""

    class Counting(CudaGraph):
        replays = 0

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counting)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(torch.cuda, "device", _device)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    return Counting
