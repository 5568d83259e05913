"""Live progress in a terminal; plain lines where the output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastlm.training.callbacks import Callback, EvalRecord, StepRecord
from fastlm.training.plot import MovingAverage

if TYPE_CHECKING:
    from fastlm.training.trainer import Trainer


class ProgressBar(Callback):
    """Shows step, loss (last and smoothed), tokens per second, learning rate and time left.

    Args:
        console: where to write; default: stderr.
        plain_interval: seconds between lines where the console is no terminal.
        label: shown before the bar, e.g. the model's name.
    """

    def __init__(self, console: Console | None = None, *, plain_interval: float = 10.0, label: str = "training"):
        self._console = console or Console(stderr=True, highlight=False)
        self._interval = plain_interval
        self._label = label
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._loss = MovingAverage(0.98)
        self._speed = MovingAverage(0.8)
        self._start_step = 0
        self._begin = 0.0
        self._last_line = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._loss, self._speed = MovingAverage(0.98), MovingAverage(0.8)
        self._start_step, self._begin = trainer.step, time.monotonic()
        self._last_line = self._begin
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self._console
            )
            self._task = self._bar.add_task(
                self._label, total=trainer.total_steps, completed=trainer.step, text="starting"
            )
            self._bar.start()

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        for record in records:
            self._loss.add(record.loss)
        last = records[-1]
        self._speed.add(last.tokens_per_second)
        total = trainer.total_steps
        place = f"{last.step}/{total}" if total else f"{last.step}"
        text = (
            f"{place} · loss {last.loss:.3f} (mean {self._loss.value:.3f})"
            f" · {_count(self._speed.value)} tokens/s · lr {last.lr:.2e} · {self._left(trainer)} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=last.step, text=text)
        elif time.monotonic() - self._last_line >= self._interval:
            self._print(f"{self._label}: {text}")

    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        best = ", the best so far" if record.best else ""
        self._print(
            f"{self._label}: step {record.step}: validation loss {record.valid_loss:.4f}, "
            f"perplexity {record.valid_perplexity:.2f}{best}"
        )

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if trainer.interrupted:
            self._print(f"{self._label}: checkpoint {path}")

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(line, markup=False, soft_wrap=True)

    def _left(self, trainer: Trainer) -> str:
        elapsed = time.monotonic() - self._begin
        candidates = []
        if trainer.total_steps is not None and trainer.step > self._start_step:
            candidates.append((trainer.total_steps - trainer.step) * elapsed / (trainer.step - self._start_step))
        if trainer.config.time_limit is not None:
            candidates.append(trainer.config.time_limit - trainer.seconds)
        return _clock(max(0.0, min(candidates))) if candidates else "?"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"
