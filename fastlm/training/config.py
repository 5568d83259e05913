"""What a training run does, as one validated, JSON-serialisable value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Optimizer = Literal["adamw", "adam", "sgd", "muon"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

_CHOICES = {
    "optimizer": ("adamw", "adam", "sgd", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
_AT_LEAST_ONE = ("batch_size", "block_length", "accumulation", "eval_interval", "keep_checkpoints")
_AT_LEAST_ONE_OR_NONE = ("max_steps", "eval_batches", "patience", "checkpoint_interval")


@dataclass(frozen=True)
class TrainingConfig:
    """Every choice of a training run; a field out of its range raises `ValueError` naming the field.

    Length of the run: the first of `max_steps`, `epochs` and `time_limit` (seconds) that is reached; at least one.
    An epoch is `len(train_tokens) / (batch_size * block_length)` steps.

    One optimiser step sees `batch_size` blocks of `block_length` tokens, in `accumulation` equal slices: more slices
    need less memory and give the same gradient.
    """

    optimizer: Optimizer = "adamw"
    """muon: `fastlm.training.Muon` for the weight matrices, AdamW for embeddings, output layer, biases and norms."""
    learning_rate: float = 1e-3
    min_learning_rate: float | None = None
    """Where cosine and linear decay end; None means a tenth of `learning_rate`."""
    warmup_steps: int = 100
    schedule: Schedule = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.9
    """SGD only; Muon's is 0.95."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: float = 0.1
    """On weight matrices only: never on biases, norms (1-D) or embedding tables. Decoupled from the gradient in adamw
    (Loshchilov and Hutter 2019); adam and sgd add it to the gradient, as in their papers."""
    clip_norm: float | None = 1.0
    """The global gradient norm is scaled down to this; None: no clipping."""

    batch_size: int = 16
    block_length: int = 128
    accumulation: int = 1
    max_steps: int | None = 2000
    epochs: float | None = None
    time_limit: float | None = None

    eval_interval: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: int | None = 40
    """Batches of the validation set per evaluation, always the same ones; None: all of it."""
    patience: int | None = None
    """Stop after this many evaluations in a row with no new best; None: never."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; None: at each evaluation."""
    keep_checkpoints: int = 2

    carry_state: bool | None = None
    """Truncated back-propagation through time: read the text in order and carry the recurrent state, detached, from
    block to block. None: for recurrent models only."""
    precision: Precision = "auto"
    """auto: bfloat16 autocast where the hardware has fast bfloat16, else float32 (see `precision.choose`)."""
    recompute: bool = False
    """Transformers: run each layer once more in the backward pass instead of keeping what it computed. A third more
    time, the same losses, a fraction of the memory."""
    seed: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in _AT_LEAST_ONE:
            _require(_is_int(getattr(self, name), 1), name, getattr(self, name), "an integer of at least 1")
        for name in _AT_LEAST_ONE_OR_NONE:
            value = getattr(self, name)
            _require(value is None or _is_int(value, 1), name, value, "an integer of at least 1, or None")
        for name in ("warmup_steps", "seed"):
            _require(_is_int(getattr(self, name), 0), name, getattr(self, name), "an integer of at least 0")
        for name in ("epochs", "time_limit", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or (_is_number(value) and value > 0), name, value, "a positive number, or None")
        _require(
            _is_number(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            self.learning_rate,
            "a positive number",
        )
        floor = self.min_learning_rate
        _require(
            floor is None or (_is_number(floor) and 0 <= floor <= self.learning_rate),
            "min_learning_rate",
            floor,
            f"between 0 and learning_rate ({self.learning_rate}), or None",
        )
        _require(
            _is_number(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0"
        )
        _require(
            _is_number(self.momentum) and 0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1"
        )
        object.__setattr__(self, "betas", tuple(self.betas))
        _require(
            len(self.betas) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "two numbers, each at least 0 and below 1",
        )
        _require(
            not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0),
            "nesterov",
            self.nesterov,
            "False, unless optimizer is sgd with momentum above 0",
        )
        _require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"a divisor of batch_size ({self.batch_size})",
        )
        _require(
            self.max_steps is not None or self.epochs is not None or self.time_limit is not None,
            "max_steps",
            None,
            "a number, unless epochs or time_limit is given",
        )
        _require(
            self.schedule == "constant" or self.max_steps is not None or self.epochs is not None,
            "schedule",
            self.schedule,
            "constant where only time_limit is given: decay needs a last step",
        )

    @property
    def final_learning_rate(self) -> float:
        """The learning rate at the end of cosine and linear decay."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    def total_steps(self, train_tokens: int) -> int | None:
        """Steps of the run over `train_tokens` tokens; None where only time limits it."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            limits.append(max(1, math.ceil(self.epochs * train_tokens / (self.batch_size * self.block_length))))
        return min(limits, default=None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of `to_dict`; an unknown key raises `ValueError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            expected = ", ".join(sorted(known))
            raise ValueError(f"training config: unknown field {unknown[0]!r}, expected one of {expected}")
        return cls(**values)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {value!r}, expected {expected}")
