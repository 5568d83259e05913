"""Training language models: `Trainer` with its `TrainingConfig`, logs, progress, curves."""

from fastlm.training.adamw import AdamW
from fastlm.training.callbacks import Callback, EvalRecord, StepRecord, TrainingResult
from fastlm.training.config import TrainingConfig
from fastlm.training.log import JsonlLog, TensorBoardLog, read_log
from fastlm.training.plot import plot_losses
from fastlm.training.progress import ProgressBar
from fastlm.training.trainer import NonFiniteError, Trainer, TrainingInterrupted

__all__ = [
    "AdamW",
    "Callback",
    "EvalRecord",
    "JsonlLog",
    "NonFiniteError",
    "ProgressBar",
    "StepRecord",
    "TensorBoardLog",
    "Trainer",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "plot_losses",
    "read_log",
]
