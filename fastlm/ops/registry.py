"""Chooses an implementation for each call of an op, and can say why.

An op has a list of implementations in order of preference. Each declares what it cannot do: `why_not(*args)` returns
None where it can serve the call, or the reason it can't. The first without a reason runs. `backend(name)` forces one,
and then its reason is an error; `explain(op, ...)` prints the list without running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKENDS", "Explanation", "Implementation", "Op", "backend", "choosing", "explain", "forced_backend"]

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
"""Names an implementation can have: plain PyTorch as the specification, PyTorch's own fused operator, and ours."""

_forced: ContextVar[str | None] = ContextVar("fastlm_backend", default=None)
_explaining: ContextVar[bool] = ContextVar("fastlm_explaining", default=False)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `run` and `why_not` take the op's arguments as the public function normalised them."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


def always(*_: Any) -> None:
    """A `why_not` for implementations that can do everything."""
    return


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: each implementation with the reason against it (None: it can), and the one chosen."""

    op: str
    reasons: tuple[tuple[str, str | None], ...]
    chosen: str | None

    def __str__(self) -> str:
        lines = [f"{self.op}:"]
        for name, reason in self.reasons:
            mark = "->" if name == self.chosen else "  "
            lines.append(f" {mark} {name:<10} {'can' if reason is None else reason}")
        return "\n".join(lines)


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


class Op:
    """An op's implementations, best first. Call it with normalised arguments to run the chosen one."""

    __slots__ = ("_by_name", "implementations", "name")

    def __init__(self, name: str, implementations: Sequence[Implementation]) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self._by_name = {implementation.name: implementation for implementation in implementations}
        unknown = set(self._by_name) - set(BACKENDS)
        if unknown:
            raise ValueError(f"op {name}: unknown backend names {sorted(unknown)}")
        if "reference" not in self._by_name:
            raise ValueError(f"op {name} has no reference")
        _OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if _explaining.get():
            raise _Explained(self.explain(*args))
        forced = _forced.get()
        if forced is not None and forced in self._by_name:
            implementation = self._by_name[forced]
            if implementation.why_not(*args) is not None:
                raise NotImplementedError(f"backend({forced!r}) can't run this call.\n{self.explain(*args)}")
            return implementation.run(*args)
        for implementation in self.implementations:
            if implementation.why_not(*args) is None:
                return implementation.run(*args)
        raise NotImplementedError(f"no implementation can run this call.\n{self.explain(*args)}")

    def explain(self, *args: Any) -> Explanation:
        """Each implementation's reason for these arguments, and the choice between them."""
        reasons = tuple((i.name, i.why_not(*args)) for i in self.implementations)
        able = [name for name, reason in reasons if reason is None]
        forced = _forced.get()
        if forced is not None and forced in self._by_name:
            able = [name for name in able if name == forced]
        return Explanation(self.name, reasons, able[0] if able else None)


_OPS: dict[str, Op] = {}


def all_ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_OPS)


def choosing() -> bool:
    """Whether ops choose their implementation themselves and run it: none is forced, `explain` is not asking."""
    return _forced.get() is None and not _explaining.get()


def forced_backend() -> str | None:
    """The backend forced by `backend()`, or None."""
    return _forced.get()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one implementation of every op that has it: "reference", "torch", "cpu", "triton" or "cuda".

    An op that has an implementation of that name uses it or raises NotImplementedError with every implementation's
    reason; an op that has none chooses as usual.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation of `op` a call with these arguments would use, and why not the others.

    `op` is a function of `fastlm.ops` or its name. Arguments are checked as in a real call; nothing is computed.

    Raises:
        ValueError: `op` names no op.
    """
    if isinstance(op, str):
        from fastlm import ops

        function = getattr(ops, op, None)
        if function is None or op not in _OPS:
            raise ValueError(f"explain: {op!r} is not one of {', '.join(sorted(_OPS))}")
    else:
        function = op
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as answer:
        return answer.explanation
    finally:
        _explaining.reset(token)
    raise ValueError(f"explain: {op!r} is not an op of fastlm.ops")
