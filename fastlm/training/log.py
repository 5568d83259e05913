"""Logs of a run: JSON lines, and TensorBoard on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastlm.checkpoints.atomic import write_atomic
from fastlm.checkpoints.errors import CheckpointError
from fastlm.training.callbacks import Callback, EvalRecord, StepRecord

if TYPE_CHECKING:
    from fastlm.training.trainer import Trainer


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL log, oldest first. A last line torn by a killed process is left out.

    Steps have "loss" (see `StepRecord`), evaluations "valid_loss" (see `EvalRecord`). Raises `ValueError` for any
    other line that is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut short
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number}: expected an object with a 'step'")
        records.append(record)
    return records


class JsonlLog(Callback):
    """Writes one JSON object a line for each step and evaluation, flushed to the system as they arrive.

    On a resumed run what the log holds beyond `trainer.step` is dropped first, for those steps are taken again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        kept = []
        if trainer.step and self.path.exists():
            kept = [record for record in read_log(self.path) if record["step"] <= trainer.step]
        text = "".join(_line(record) for record in kept)
        write_atomic(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = self.path.open("a", encoding="utf-8")

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        self._write("".join(_line(record.to_dict()) for record in records))

    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        self._write(_line(record.to_dict()))

    def sync(self) -> None:
        """Makes the log durable: a checkpoint must never be ahead of it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                raise CheckpointError(self.path, f"could not be written: {error}") from error


class TensorBoardLog(Callback):
    """Writes the same curves for TensorBoard; needs the `tensorboard` extra."""

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"tensorboard: not installed ({error}); install it with `pip install fastlm[tensorboard]`"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        for record in records:
            self._scalars(record.step, {"loss/train": record.loss, "lr": record.lr, "grad_norm": record.grad_norm})

    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        self._scalars(record.step, {"loss/valid": record.valid_loss})

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
