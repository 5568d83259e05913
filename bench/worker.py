"""An engine in a process of its own: its OpenMP runtime apart from ours, its crash survived, its memory its own.

The parent keeps the process between calls and waits in a pipe, so that turns of two engines alternate in one run and
only one of them computes at a time. `python -m bench.worker ENGINE MODEL ...` is the child's side.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OURS", "EngineError", "Pool", "Task", "Worker"]

OURS = "fastlm"
_ROOT = Path(__file__).resolve().parent.parent


class EngineError(RuntimeError):
    """The engine is not installed, refused the work, or died; `engine` is its name."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine}: {reason}")
        self.engine = engine


class Worker:
    """Calls methods of `Engine(model, threads, **options)` of a module of bench.engines in a child process; an engine
    with a dot in its name is a module from elsewhere.

    Raises:
        EngineError: here or from `call`: not installed, an exception, a crash, or no answer within `timeout` seconds.
    """

    def __init__(self, engine: str, model: Path, *, threads: int, timeout: float = 600, **options: Any) -> None:
        self.engine = engine
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        search = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", engine, str(model), str(threads), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": str(threads)},
        )
        self._answer()  # that the engine has loaded its model

    def call(self, method: str, *args: Any) -> Any:
        """The result of `Engine.method(*args)`."""
        assert self._process.stdin is not None
        try:
            pickle.dump((method, args), self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(self.engine, self._death()) from None
        return self._answer()

    def _answer(self) -> Any:
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], self._timeout)[0]:
            self._process.kill()
            raise EngineError(self.engine, f"no answer within {self._timeout:.0f} s")
        try:
            state, value = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            raise EngineError(self.engine, self._death()) from None
        if state == "error":
            raise EngineError(self.engine, value)
        return value

    def _death(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process died ({how}){': ' + lines[-1][:200] if lines else ''}"

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what a dead child has not read
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Pool:
    """Workers by engine, model and options, each started when first asked for; all closed at the end."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._workers: dict[str, Worker] = {}
        self._failed: dict[str, EngineError] = {}

    def get(self, engine: str, model: Path, **options: Any) -> Worker:
        """The worker; an engine that failed once fails again with the same reason, not a new start."""
        key = json.dumps([engine, str(model), options])
        if key in self._failed:
            raise self._failed[key]
        if key not in self._workers:
            try:
                self._workers[key] = Worker(engine, model, threads=self._threads, **options)
            except EngineError as error:
                self._failed[key] = error
                raise
        return self._workers[key]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


@dataclass(frozen=True)
class Task:
    """One call of an engine, for `Case.ours` or `Case.peer`; the engine is started when it is first called.

    `model` may be a function that makes the model's file, with the engine's own converter perhaps.
    """

    pool: Pool
    engine: str
    model: Path | Callable[[], Path]
    method: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self._worker().call(self.method, *self.args)

    def _worker(self) -> Worker:
        try:
            model = self.model() if callable(self.model) else self.model
        except Exception as error:
            raise EngineError(self.engine, f"no model for it: {type(error).__name__}: {error}") from error
        return self.pool.get(self.engine, model, **self.options)

    def settle(self) -> tuple[int, str]:
        """`Engine.settle` for this work."""
        spared, said = self._worker().call("settle", *self.args)
        return int(spared), str(said)

    def about(self) -> str:
        """How the engine says it was built or computes."""
        return str(self._worker().call("about"))

    def forget_peak(self) -> bool:
        """Starts `peak_bytes` again from what is held now; False where Linux can't."""
        return bool(self._worker().call("forget_peak"))

    def peak_bytes(self) -> int:
        """Most memory that the engine's process, weights included, held since `forget_peak`."""
        return int(self._worker().call("peak_rss"))


def _serve(engine: str, model: str, threads: int, options: dict[str, Any]) -> None:
    # What native libraries print to stdout must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(state: str, value: Any) -> None:
        pickle.dump((state, value), answers, protocol=5)
        answers.flush()

    from bench import measure

    own = {"peak_rss": measure.peak_rss, "forget_peak": measure.forget_peak}
    try:
        module = importlib.import_module(engine if "." in engine else f"bench.engines.{engine}")
        served = module.Engine(model, threads, **options)
    except Exception as error:
        answer("error", f"{type(error).__name__}: {error}")
        return
    answer("ready", None)
    while True:
        try:
            method, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = (own.get(method) or getattr(served, method))(*args)
        except Exception as error:
            answer("error", f"{type(error).__name__}: {error}")
        else:
            answer("result", result)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
