"""Recording a decode step once and replaying it without Python: on a CPU what a CUDA graph is on a GPU.

While a step is recorded, every native kernel runs and also becomes a step of a native program, with the addresses it
was given. So what differs from one replay to the next must lie in memory that the program itself updates: token ids,
positions, lengths. A torch operation would run now and be missing from the replay; a dispatch mode sees it, turns the
few that a decode step needs into kernels, and refuses all others by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.kernels import native
from fastlm.kernels.cpu import elementwise
from fastlm.kernels.cpu.linear import dequantize_rows

__all__ = ["CaptureError", "Captured", "Refused"]

aten = torch.ops.aten


class CaptureError(RuntimeError):
    """The step does something that cannot be replayed; the message names it."""


class Refused(RuntimeError):
    """A kernel refused its input in the middle of a replay."""


class Captured:
    """A step that has run once, and can be run again natively.

    Args:
        step: uses native kernels alone, and leaves its results in tensors that it reads again the next time. Everything
            it touches but does not make itself (weights, caches) must outlive this object unmoved.
        watched: int64, contiguous: what to log after each replay, token ids. Not made by the step.

    Raises:
        CaptureError: the step has done something that cannot be replayed. It may have run in part.
    """

    def __init__(self, step: Callable[[], Any], watched: Tensor) -> None:
        self._watched = watched
        self._program = native.CPU.require().Program(native.num_threads())
        recorder = _Recorder()
        self._program.start()
        try:
            with recorder:
                self.result = step()
        except native.CPU.require().NotRecordable as error:
            raise CaptureError(str(error)) from None
        finally:
            self._program.stop()
        self._kept = recorder.kept

    def run(self, times: int, stops: Collection[int] = ()) -> list[list[int]]:
        """Runs the step up to `times` more times, fewer where one of `stops` turns up among the watched values.

        The GIL is released meanwhile.

        Returns:
            The watched values after each of them.

        Raises:
            Refused: a kernel refused its input; the earlier steps' values are lost.
        """
        count = self._watched.numel()
        log = torch.empty(times, count, dtype=torch.int64)
        done, refused = self._program.run(
            times, self._watched.data_ptr(), count, list(stops), log.data_ptr(), native.num_threads()
        )
        if refused:
            raise Refused(f"a kernel refused its input in step {done}")
        values: list[list[int]] = log[:done].tolist()
        return values


class _Recorder(TorchDispatchMode):
    """Keeps the memory that a step allocates, translates what it can, and refuses the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to shield the method from torch.compile takes as long as the method

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALLOCATIONS or _is_view(func):
            result = func(*args, **kwargs)
        elif func in _KERNELS:
            result = _KERNELS[func](*args, **kwargs)
        else:
            raise CaptureError(f"{func} has no native kernel, so it can't be replayed")
        self.kept.append(result)
        return result


_ALLOCATIONS = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
)


@functools.cache  # a step asks a thousand times, of a dozen operations
def _is_view(func: Any) -> bool:
    """Whether the result is the argument's memory under another shape: nothing to do in a replay.

    By its schema so is `lift_fresh`, with which `torch.tensor` ends: a constant, which may well hold what was true of
    this one step.
    """
    if func is aten.lift_fresh.default:
        return False
    returns = [value.alias_info for value in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _expect(holds: bool, func: str, *tensors: Tensor) -> None:
    if not holds:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)
        raise CaptureError(f"{func} of {shapes}: only contiguous CPU tensors of one shape and dtype can be replayed")


def _plain(*tensors: Tensor) -> bool:
    return all(t.is_cpu and t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)


def _add(a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    holds = isinstance(b, Tensor) and alpha == 1 and a.dtype == torch.float32 and a.shape == b.shape and _plain(a, b)
    _expect(holds, "add", a, *([b] if isinstance(b, Tensor) else []))
    output = torch.empty_like(a)
    elementwise.add(a, b, output)
    return output


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _expect(target.shape == source.shape and target.dim() > 0 and _plain(target, source), "copy_", target, source)
    elementwise.copy_rows(source, target)
    return target


def _index_select(source: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim != 0 or index.dtype != torch.int64 or not (_plain(source) and _plain(index)):
        raise CaptureError("index_select can be replayed only of rows of a contiguous CPU tensor")
    output = torch.empty(len(index), *source.shape[1:], dtype=source.dtype)
    elementwise.copy_rows(source, output, source_index=index)
    return output


def _index_copy(target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    fits = dim == 0 and index.dtype == torch.int64 and _plain(index) and source.shape[1:] == target.shape[1:]
    _expect(fits and _plain(target, source), "index_copy_", target, source)
    elementwise.copy_rows(source, target, target_index=index)
    return target


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if train:
        raise CaptureError("dropout can't be replayed: put the model into evaluation mode")
    return input


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    _expect(weight.dtype == torch.float32 and _plain(weight) and _plain(indices), "embedding", weight, indices)
    _expect(indices.dtype == torch.int64, "embedding", weight, indices)
    output = torch.empty(indices.numel(), weight.shape[1])
    if dequantize_rows(weight, 0, len(weight), output, ids=indices) >= 0:
        raise IndexError("embedding: an id is outside the table")
    return output.view(*indices.shape, weight.shape[1])


_KERNELS: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: _add,
    aten.copy_.default: _copy,
    aten.dropout.default: _dropout,
    aten.embedding.default: _embedding,
    aten.index_copy_.default: _index_copy,
    aten.index_select.default: _index_select,
}
