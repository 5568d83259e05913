"""What a case is: a correctness gate and two callables that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Case", "GateFailed", "require"]


class GateFailed(AssertionError):
    """The result is wrong, so its speed is not a figure."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is computed.
        shape: its size, as the row shows it.
        peer_name: whom it is compared with.
        gate: raises GateFailed where ours does not compute what it should; may return what it measured, for the row.
        ours, peer: do the work once: plain callables, or `bench.worker.Task`s, which run in processes of their own.
        work: units of `unit` per call, for the rate column (tokens, say). The unit "bytes" and "seconds": the callables
            return the figure, instead of being timed.
        seconds: about how long a turn takes; a Task's is one call.
        pairs: turns of each.
        goal: the ratio this project set itself, or None.
        moved: bytes of weights, keys or logits that one call has to read, once per pass over them.
        resident: bytes of one pass, which decide from which cache they come; None: `moved`.
        flops: floating-point operations of one call.
        note: what a reader must know to reproduce the row.
        device: where it runs: "cpu" or "cuda".
        settle: called between gate and turns: brings ours to its steady state, and returns what the text of the row
            should say of it, with the bytes of one pass (`resident`) that are then not read.
    """

    name: str
    shape: str
    peer_name: str
    gate: Callable[[], str | None]
    ours: Callable[[], object]
    peer: Callable[[], object]
    work: float = 1.0
    unit: str = "calls"
    goal: float | None = None
    seconds: float = 0.3
    pairs: int = 7
    moved: float | None = None
    resident: float | None = None
    flops: float | None = None
    note: str = ""
    device: str = "cpu"
    settle: Callable[[], tuple[int, str]] | None = None

    @property
    def returns_figure(self) -> bool:
        """Whether ours and peer return what is compared."""
        return self.unit in ("bytes", "seconds")


def require(condition: bool, message: str) -> None:
    """Raises GateFailed with `message` unless the condition holds."""
    if not condition:
        raise GateFailed(message)
