"""Timing to believe on a shared, noisy machine: ours and the peer interleaved, the ratio taken pair by pair."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "Comparison",
    "compare",
    "compare_figures",
    "forget_peak",
    "grown_bytes",
    "matmul_rate",
    "peak_rss",
    "read_bandwidth",
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


def _seconds_per_call(function: Callable[[], object], calls: int, settle: float = 0.0) -> float:
    time.sleep(settle)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calls_for(function: Callable[[], object], seconds: float) -> int:
    function()  # warm up: caches, packed weights, thread pool
    if not seconds:
        return 1
    once = _seconds_per_call(function, 1)
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
) -> Comparison:
    """Times the two in turn `pairs` times, each turn about `seconds` of calls (0: one call), who begins alternating.

    `settle` seconds are waited before each turn: the threads of an engine in another process go on spinning for some
    milliseconds after their work, on the cores that the next one needs.
    """
    ours_calls, peer_calls = _calls_for(ours, seconds), _calls_for(peer, seconds)
    times = []
    for pair in range(pairs):
        turns = [(ours, ours_calls), (peer, peer_calls)]
        first, second = (_seconds_per_call(*turn, settle) for turn in (turns if pair % 2 == 0 else turns[::-1]))
        times.append((first, second) if pair % 2 == 0 else (second, first))
    return _summary(times)


def compare_figures(ours: Callable[[], object], peer: Callable[[], object], *, pairs: int) -> Comparison:
    """For callables that return the figure themselves (bytes, say) instead of being timed."""
    return _summary([(float(ours()), float(peer())) for _ in range(pairs)])  # type: ignore[arg-type]


def read_bandwidth(nbytes: float = 1e9) -> float:
    """Bytes per second at which all threads read `nbytes` again and again: a working set that fits a cache is read
    from it. The best of several passes of torch's sum and dot product; 1 MB at the least, below which a call's own
    cost counts."""
    import torch

    data = torch.ones(int(max(nbytes, 1e6)) // 4)
    calls = max(1, round(2e7 / data.nbytes))
    readers: list[Callable[[], object]] = [data.sum, lambda: torch.dot(data, data)]
    return data.nbytes / min(_seconds_per_call(reader, calls) for _ in range(4) for reader in readers)


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of torch's float32 matrix product: the ceiling of arithmetic."""
    import torch

    left, right = torch.randn(2, size, size)
    _seconds_per_call(lambda: left @ right, 1)
    return 2 * size**3 / min(_seconds_per_call(lambda: left @ right, 1) for _ in range(4))


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
