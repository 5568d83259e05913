"""What a case is: a correctness gate and two callables that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Case", "GateFailed"]


class GateFailed(AssertionError):
    """The result is wrong, so its speed is not a figure."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is computed.
        shape: its size, as the row shows it.
        peer_name: whom it is compared with.
        gate: raises GateFailed where ours does not compute what it should.
        ours, peer: do the work once.
        work: units of `unit` per call, for the rate column (tokens, say).
        goal: the ratio this project set itself, or None.
    """

    name: str
    shape: str
    peer_name: str
    gate: Callable[[], None]
    ours: Callable[[], object]
    peer: Callable[[], object]
    work: float = 1.0
    unit: str = "calls"
    goal: float | None = None
    seconds: float = 0.3
    pairs: int = 7


def require(condition: bool, message: str) -> None:
    """Raises GateFailed with `message` unless the condition holds."""
    if not condition:
        raise GateFailed(message)
