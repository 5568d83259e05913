"""Timing to believe on a shared, noisy machine: ours and the peer interleaved, the ratio taken pair by pair."""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "Comparison",
    "compare",
    "compare_figures",
    "device_ceilings",
    "device_peak",
    "forget_peak",
    "grown_bytes",
    "matmul_rate",
    "peak_rss",
    "read_bandwidth",
    "waiter",
]


@dataclass(frozen=True)
class Comparison:
    """Seconds (or bytes) per call and the ratio peer/ours: how many times less ours takes. The spread is the middle
    half."""

    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def _seconds_per_call(
    function: Callable[[], object], calls: int, settle: float = 0.0, wait: Callable[[], object] | None = None
) -> float:
    time.sleep(settle)
    if wait is not None:
        wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) / calls


def _calls_for(function: Callable[[], object], seconds: float, wait: Callable[[], object] | None = None) -> int:
    function()  # warm up: caches, packed weights, thread pool, compiled kernels
    if not seconds:
        return 1
    once = _seconds_per_call(function, 1, wait=wait)
    return max(1, round(seconds / max(once, 1e-7)))


def _summary(pairs: list[tuple[float, float]]) -> Comparison:
    ratios = sorted(peer / ours for ours, peer in pairs)
    return Comparison(
        ours=statistics.median(ours for ours, _ in pairs),
        peer=statistics.median(peer for _, peer in pairs),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[(3 * len(ratios)) // 4],
        pairs=len(pairs),
    )


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    pairs: int = 7,
    seconds: float = 0.3,
    settle: float = 0.0,
    wait: Callable[[], object] | None = None,
) -> Comparison:
    """Times the two in turn `pairs` times, each turn about `seconds` of calls (0: one call), who begins alternating.

    `settle` seconds are waited before each turn: the threads of an engine in another process go on spinning for some
    milliseconds after their work, on the cores that the next one needs. `wait` returns when a device has done what it
    was given: it stands before and after each turn, not between the turn's calls, which queue up as they do in use.
    """
    ours_calls, peer_calls = _calls_for(ours, seconds, wait), _calls_for(peer, seconds, wait)
    times = []
    for pair in range(pairs):
        turns = [(ours, ours_calls), (peer, peer_calls)]
        first, second = (_seconds_per_call(*turn, settle, wait) for turn in (turns if pair % 2 == 0 else turns[::-1]))
        times.append((first, second) if pair % 2 == 0 else (second, first))
    return _summary(times)


def compare_figures(ours: Callable[[], object], peer: Callable[[], object], *, pairs: int) -> Comparison:
    """For callables that return the figure themselves (bytes, say) instead of being timed."""
    return _summary([(float(ours()), float(peer())) for _ in range(pairs)])  # type: ignore[arg-type]


def read_bandwidth(nbytes: float = 1e9) -> float:
    """Bytes per second at which all threads read `nbytes` again and again: a working set that fits a cache is read
    from it. In huge pages, where our weights lie too: in ordinary ones less is read. The best of several passes of
    torch's sum, dot product and product with a vector; 1 MB at the least, below which a call's own cost counts."""
    import torch

    from fastlm.kernels.cpu import memory

    vector = torch.ones(2048)
    rows = (
        memory.take(int(max(nbytes, 1e6)) // vector.nbytes * vector.nbytes).view(torch.float32).fill_(1).view(-1, 2048)
    )
    data = rows.view(-1)
    calls = max(1, round(2e7 / data.nbytes))
    readers: list[Callable[[], object]] = [data.sum, lambda: torch.dot(data, data), lambda: torch.mv(rows, vector)]
    return data.nbytes / min(_seconds_per_call(reader, calls) for _ in range(6) for reader in readers)


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of torch's float32 matrix product: the ceiling of arithmetic."""
    import torch

    left, right = torch.randn(2, size, size)
    _seconds_per_call(lambda: left @ right, 1)
    return 2 * size**3 / min(_seconds_per_call(lambda: left @ right, 1) for _ in range(4))


def device_ceilings(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes per second of a copy within the device's memory (read and written bytes counted), and FLOP/s of a square
    bfloat16 matrix product."""
    import torch

    wait = waiter(device)
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    found = []
    for work in (lambda: target.copy_(source), lambda: left @ right):
        calls = _calls_for(work, 0.05, wait)
        found.append(min(_seconds_per_call(work, calls, wait=wait) for _ in range(4)))
    return {"read_bytes_per_s": 2 * source.nbytes / found[0], "flop_per_s": 2 * size**3 / found[1]}


def waiter(device: torch.device) -> Callable[[], object] | None:
    """What waits for a device to finish; None for the CPU, which has when a call returns."""
    import torch

    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


def device_peak(function: Callable[[], object], device: torch.device) -> int | None:
    """By how much one call raises the device's memory above what was allocated before; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_rss() -> int:
    """Most bytes of memory that this process ever held."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> bool:
    """Starts `peak_rss` again from what is held now; False where Linux can't."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def grown_bytes(function: Callable[[], object]) -> int | None:
    """By how much one call raises this process's memory above what it held before; None where Linux can't say."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # else memory that earlier calls freed, and malloc kept, hides what this one takes
    if not forget_peak():
        return None
    before = peak_rss()
    function()
    return max(0, peak_rss() - before)
