"""Philox 4x32-10, a counter-based random number generator.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405. A draw is a function of key and counter alone, so that it can be made
anywhere, in any order, with no state to carry.
"""

from __future__ import annotations

__all__ = ["philox4x32", "random64"]

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox: four 32-bit words from four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random64(seed: int, sequence: int, position: int, lane: int) -> int:
    """64 random bits of (seed, sequence, position, lane): seed and sequence mod 2^64, position and lane mod 2^32."""
    counter = (position & _MASK, lane & _MASK, sequence & _MASK, (sequence >> 32) & _MASK)
    word0, word1, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return word0 | word1 << 32
