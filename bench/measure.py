"""Timing to believe on a shared, noisy machine: ours and the peer interleaved, the ratio taken pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Comparison", "compare", "read_bandwidth"]


@dataclass(frozen=True)
class Comparison:
    """Seconds per call and the ratio peer/ours: how many times faster ours is. The spread is the middle half."""

    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def _seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calls_for(function: Callable[[], object], seconds: float) -> int:
    function()  # warm up: caches, packed weights, thread pool
    once = _seconds_per_call(function, 1)
    return max(1, round(seconds / max(once, 1e-7)))


def compare(
    ours: Callable[[], object], peer: Callable[[], object], *, pairs: int = 7, seconds: float = 0.3
) -> Comparison:
    """Times the two in turn `pairs` times, each turn as many calls as take about `seconds`."""
    ours_calls, peer_calls = _calls_for(ours, seconds), _calls_for(peer, seconds)
    times = [(_seconds_per_call(ours, ours_calls), _seconds_per_call(peer, peer_calls)) for _ in range(pairs)]
    ratios = sorted(peer_time / ours_time for ours_time, peer_time in times)
    return Comparison(
        ours=statistics.median(ours_time for ours_time, _ in times),
        peer=statistics.median(peer_time for _, peer_time in times),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[(3 * len(ratios)) // 4],
        pairs=pairs,
    )


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes per second at which all threads read memory: the best of several sums over a large float32 tensor."""
    import torch

    data = torch.ones(megabytes * 1_000_000 // 4)
    best = min(_seconds_per_call(lambda: data.sum(), 1) for _ in range(6))
    return data.nbytes / best
