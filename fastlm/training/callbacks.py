"""What may watch a training run: progress bars, logs, your own code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastlm.training.trainer import Trainer

StopReason = Literal["max_steps", "time_limit", "early_stopping", "interrupted"]


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. `step` counts from 1; `loss` is in nats per token; `grad_norm` is before clipping, infinite
    where float16 overflowed and the step was skipped; `seconds` is training time so far."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: there `grad_norm` is None."""
        return {**asdict(self), "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None}


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on validation data. `valid_loss` is in nats per token, over `tokens` tokens."""

    step: int
    valid_loss: float
    valid_perplexity: float
    tokens: int
    best: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. Losses are in nats per token; `best_*` are None where nothing was evaluated."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None
    best_loss: float | None
    best_step: int | None
    reason: StopReason


class Callback:
    """Override what you need. Steps arrive in groups, so that watching a run costs it no synchronisation per step."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; a resumed run has `trainer.step` above 0."""

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        """After some steps."""

    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        """After an evaluation."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint is safe on the disk."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, and also after an error or an interrupt."""
