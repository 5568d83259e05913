"""TrainingConfig: JSON round trip, and every error names its field."""

from __future__ import annotations

import json

import pytest

from fastlm.training.config import TrainingConfig


def test_survives_json() -> None:
    config = TrainingConfig(
        optimizer="sgd", nesterov=True, betas=(0.8, 0.95), max_steps=None, epochs=2.5, clip_norm=None
    )
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("precision", "int8"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("min_learning_rate", 1.0),
        ("warmup_steps", -1),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("momentum", 1.0),
        ("nesterov", True),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("block_length", True),
        ("accumulation", 3),
        ("max_steps", 0),
        ("epochs", -1.0),
        ("time_limit", 0.0),
        ("eval_interval", 0),
        ("eval_batches", 0),
        ("patience", 0),
        ("checkpoint_interval", 0),
        ("keep_checkpoints", 0),
        ("seed", -1),
    ],
)
def test_an_error_names_the_field_and_the_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        TrainingConfig(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        TrainingConfig(max_steps=None)
    with pytest.raises(ValueError, match="schedule"):
        TrainingConfig(max_steps=None, time_limit=60.0)
    assert TrainingConfig(max_steps=None, time_limit=60.0, schedule="constant").total_steps(1000) is None


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="learningrate"):
        TrainingConfig.from_dict({"learningrate": 1e-3})


def test_the_shorter_of_steps_and_epochs_counts() -> None:
    config = TrainingConfig(batch_size=4, block_length=10, max_steps=100, epochs=2.0)
    assert config.total_steps(1000) == 50
    assert config.total_steps(1001) == 51
    assert config.total_steps(100_000) == 100
