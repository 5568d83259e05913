"""A decode step as a CUDA graph: what `capture` is on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastlm.generation.capture import CaptureError, Refused
from fastlm.kernels import cuda, native

__all__ = ["Graph", "records", "sampling_device"]

_STEPS = 16  # replays between two looks at the tokens


def records(device: torch.device) -> bool:
    """Whether work on `device` can be recorded as a graph."""
    return device.type == "cuda"


def sampling_device(device: torch.device) -> torch.device:
    """Where tokens are sampled for a model on `device`: there where it has a sampler, else on the CPU, whose kernel
    takes less time over a copy of the logits than dozens of torch operations on the device would."""
    on_device = device.type == "cuda" and cuda.unavailable(device) is None and hasattr(native.CUDA.module, "sample")
    return device if on_device else torch.device("cpu")


class Graph:
    """A step that has run once, and can be run again without Python.

    Args:
        device: the CUDA device that the step works on; the current one may be another.
        step: looks at no value: it leaves its results in tensors that it reads again the next time. Everything it
            touches but does not make itself must outlive this object unmoved.
        watched: int64: what to log after each step, token ids; below 0 where the sampler refused its input.
        snapshot: returns a function that brings back all that the step changes; steps beyond a stop are undone by it.
        after: what to do with the step's result on the host before the next one, such as sampling there; it sets
            `watched`, and is waited for after each step. None: the device runs ahead by several steps.

    Raises:
        CaptureError: CUDA can't record the step, or a value is below 0; it has run once.
    """

    def __init__(
        self,
        device: torch.device,
        step: Callable[[], Tensor],
        watched: Tensor,
        snapshot: Callable[[], Callable[[], None]],
        after: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._device, self._watched, self._snapshot, self._after = device, watched, snapshot, after
        self._log = torch.empty(_STEPS, watched.numel(), dtype=torch.int64, device=watched.device)
        with torch.cuda.device(device):
            self._record(step)
            if after is not None:
                after(self.result)

    def _record(self, step: Callable[[], Tensor]) -> None:
        # The first run is an ordinary one, on the stream that will record: it compiles kernels, and libraries allocate
        # their workspaces, which belong to a stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), native.recording_on_device():
            first = step()
        torch.cuda.current_stream().wait_stream(stream)
        if self._after is None and bool((self._watched < 0).any()):
            raise CaptureError("the sampler refused its input")  # run op by op, the step says why
        self._graph: Any = torch.cuda.CUDAGraph()
        try:
            # Other threads of the program, as one that pins memory, may go on using the device.
            recording = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
            with recording, native.recording_on_device():
                self.result = step()
        except RuntimeError as error:
            raise CaptureError(f"CUDA can't record the step: {str(error).splitlines()[0]}") from error
        self.result.copy_(first)  # recording computed nothing

    def run(self, times: int, stops: Collection[int] = ()) -> list[list[int]]:
        """Runs the step up to `times` more times, fewer where one of `stops` turns up among the watched values.

        The host waits once for all of up to 16 steps; those that ran beyond a stop are undone.

        Returns:
            The watched values after each of them.

        Raises:
            Refused: a value was below 0; `result` is that of the step.
        """
        with torch.cuda.device(self._device):
            return self._run(times, frozenset(stops))

    def _run(self, times: int, stops: frozenset[int]) -> list[list[int]]:
        values: list[list[int]] = []
        most = 1 if self._after is not None else _STEPS
        while len(values) < times:
            count = min(times - len(values), most)
            undo = self._snapshot() if count > 1 else None
            for at in range(count):
                self._graph.replay()
                if self._after is not None:
                    self._after(self.result)
                self._log[at].copy_(self._watched)
            found: list[list[int]] = self._log[:count].tolist()
            # What comes after a stop does not count, be it a refusal.
            ended = next((at + 1 for at, step in enumerate(found) if min(step) < 0 or not stops.isdisjoint(step)), None)
            if ended is not None and undo is not None and ended < count:
                undo()
                for _ in range(ended):
                    self._graph.replay()
            if ended is not None and min(found[ended - 1]) < 0:
                raise Refused("the sampler refused its input")
            values += found[:ended]
            if ended is not None:
                break
        return values
