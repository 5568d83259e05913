"""The training loop: it learns, its arithmetic is what it says, it stops when it should and says why."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.runs import VOCABULARY, entropy_rate, losses, markov_text, tiny_model, tiny_trainer, transition

from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.run import load_run
from fastlm.evaluation import Result
from fastlm.training import (
    Callback,
    EvalRecord,
    NonFiniteError,
    StepRecord,
    Trainer,
    TrainingConfig,
    TrainingInterrupted,
    batches,
    read_log,
    resume,
    trainer,
)


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_the_loss_reaches_the_entropy_of_the_text_and_not_less(kind: str) -> None:
    entropy = entropy_rate(transition())
    assert entropy < math.log(VOCABULARY) - 0.5, "too easy: a model that learns nothing would pass"
    text = markov_text(30_000)
    config = TrainingConfig(
        max_steps=200,
        warmup_steps=10,
        learning_rate=1e-2 if kind == "gpt" else 3e-2,
        batch_size=16,
        block_length=16,
        eval_interval=200,
        eval_batches=None,
        weight_decay=0.0,
    )
    result = Trainer(tiny_model(kind, dropout=0.0), text[:20_000], text[20_000:], config).train()
    assert result.best_loss is not None
    # 10,000 tokens: the sample's own entropy lies within about 0.01 of the chain's.
    assert entropy - 0.02 < result.best_loss < entropy + 0.06
    assert (result.steps, result.tokens, result.reason) == (200, 200 * 256, "max_steps")


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_accumulation_is_the_big_batch(kind: str) -> None:
    trained = []
    for slices in (1, 4):
        run = tiny_trainer(kind, dropout=0.0, accumulation=slices, max_steps=3, optimizer="sgd", precision="float32")
        run.train()
        trained.append(run)
    before = tiny_model(kind)
    for start, one, many in zip(before.parameters(), *(run.model.parameters() for run in trained), strict=True):
        moved = (one - start).abs().max()
        assert (one - many).abs().max() <= 1e-4 * moved + 1e-8


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        self.values += [record.loss for record in records]


def _carried_losses(monkeypatch: pytest.MonkeyPatch | None = None, **config: Any) -> tuple[list[float], list[float]]:
    """Losses of 6 steps of truncated BPTT at a vanishing learning rate, and of the same tokens in one pass each row."""
    seen = _Losses()
    fields = {"optimizer": "sgd", "learning_rate": 1e-30, "max_steps": 6, "dropout": 0.0, "precision": "float32"}
    run = tiny_trainer("lstm", None, seen, **{**fields, **config})
    if monkeypatch is not None:
        monkeypatch.setattr(
            batches.CarriedBlocks, "slices", lambda self, step: ((x, y, None) for x, y, _ in plain(self, step))
        )
    run.train()
    text, rows, length = markov_text(1400)[:1200], 4, 1199 // 4
    starts = [row * length for row in range(rows)]
    inputs = torch.stack([text[start : start + 96] for start in starts])
    targets = torch.stack([text[start + 1 : start + 97] for start in starts])
    model = tiny_model("lstm").eval()
    logits = model(inputs).transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return seen.values, each.view(rows, 6, 16).mean(dim=(0, 2)).tolist()


plain = batches.CarriedBlocks.slices


@pytest.mark.parametrize("accumulation", [1, 2])
def test_carried_state_equals_the_full_pass(accumulation: int) -> None:
    found, expected = _carried_losses(accumulation=accumulation)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_state_that_is_not_carried_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = _carried_losses(monkeypatch)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found != pytest.approx(expected, rel=1e-5)


def test_the_state_starts_over_with_the_text() -> None:
    seen = _Losses()
    blocks = 1199 // 4 // 16
    tiny_trainer("lstm", None, seen, optimizer="sgd", learning_rate=1e-30, max_steps=blocks + 2, dropout=0.0).train()
    assert seen.values[blocks : blocks + 2] == pytest.approx(seen.values[:2], rel=1e-6)


def test_the_log_has_every_step_and_evaluation(tmp_path: Path) -> None:
    tiny_trainer("gpt", tmp_path).train()
    records = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "valid_loss" in r] == [5, 10, 15, 20]


class _Scripted:
    """Stands in for `evaluate` with losses of our choosing."""

    def __init__(self, *values: float):
        self.values = list(values)

    def __call__(self, *_: Any, **__: Any) -> Result:
        return Result(self.values.pop(0), 100)


def test_early_stopping_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {}

    class Keep(Callback):
        def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
            weights[record.step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    monkeypatch.setattr(trainer, "evaluate", _Scripted(3.0, 2.0, 2.5, 2.4, 1.0))
    result = tiny_trainer("gpt", tmp_path, Keep(), max_steps=100, patience=2).train()
    assert (result.reason, result.steps, result.best_step, result.best_loss) == ("early_stopping", 20, 10, 2.0)
    best = load_run(tmp_path).model.state_dict()
    assert all(torch.equal(best[name], weights[10][name]) for name in best)
    assert not all(torch.equal(best[name], weights[20][name]) for name in best)
    # Resumed, it is still over.
    assert tiny_trainer("gpt", tmp_path, max_steps=100, patience=2).resume().train().reason == "early_stopping"


def test_time_limit() -> None:
    result = tiny_trainer("gpt", max_steps=None, time_limit=0.3, schedule="constant").train()
    assert result.reason == "time_limit"
    assert 0.3 <= result.seconds < 20 and result.steps >= 1


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    model = tiny_model("gpt")
    config = TrainingConfig(max_steps=4, batch_size=2, block_length=8)
    result = Trainer(model, markov_text(100).tolist(), None, config, tmp_path).train()
    assert result.best_loss is None and result.loss is not None
    saved = load_run(tmp_path).model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "validation"])
def test_what_is_not_finite_stops_the_run_and_spoils_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = tiny_trainer("gpt", tmp_path, precision="float32")
    parameter = next(run.model.parameters())
    step = run.optimizer.step

    def poisoned(*arguments: Any, **options: Any) -> Any:
        if run.step == 7 - 1 and where == "gradient":
            assert parameter.grad is not None
            parameter.grad[0, 0] = math.inf
        result = step(*arguments, **options)
        if (run.step, where) in ((7 - 2, "loss"), (10 - 1, "weight"), (10 - 1, "validation")):
            parameter.data.fill_(math.nan)
        return result

    monkeypatch.setattr(run.optimizer, "step", poisoned)
    if where == "weight":
        run._valid_tokens = None
    with pytest.raises(
        NonFiniteError, match=rf"step {10 if where in ('weight', 'validation') else 7}: .*step-00000005"
    ):
        run.train()
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["step-00000005"]
    saved = load_run(resume.checkpoints(tmp_path)[-1]).model
    assert all(bool(torch.isfinite(p).all()) for p in saved.parameters())


class _Press(Callback):
    """Presses Ctrl-C `times` times when an evaluation has been made."""

    def __init__(self, times: int):
        self.times = times

    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted) as stop:
        tiny_trainer("gpt", tmp_path / "a", _Press(1), eval_interval=7).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.value.result.steps == 7
    assert stop.value.checkpoint == tmp_path / "a" / "checkpoints" / "step-00000007"
    tiny_trainer("gpt", tmp_path / "a", eval_interval=7).resume().train()
    tiny_trainer("gpt", tmp_path / "b", eval_interval=7).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("moment", ["steps", "evaluation", "checkpoint"])
def test_ctrl_c_at_any_moment_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Press(Callback):
        pressed = False

        def __getattribute__(self, name: str) -> Any:
            if name == f"on_{moment}" and not Press.pressed:
                Press.pressed = True
                signal.raise_signal(signal.SIGINT)
            return super().__getattribute__(name)

    monkeypatch.setattr(trainer, "_DRAIN_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted) as stop:
        tiny_trainer("gpt", tmp_path, Press()).train()
    steps = stop.value.result.steps
    assert 1 <= steps <= 6
    assert stop.value.checkpoint is not None and resume.read(stop.value.checkpoint).step == steps
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl") if "loss" in r] == list(range(1, steps + 1))


def test_a_second_ctrl_c_aborts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        tiny_trainer("gpt", tmp_path, _Press(2)).train()
    assert not isinstance(stop.value, TrainingInterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    class Fill(Callback):
        def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
            if record.step == 10:  # from here on no file may grow beyond 16 KiB: the system refuses the write
                resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"step-00000010.*File too large.*step-00000005"):
            tiny_trainer("gpt", tmp_path / "a", Fill()).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tiny_trainer("gpt", tmp_path / "a").resume().train()
    tiny_trainer("gpt", tmp_path / "b").train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    tiny_trainer("gpt", tmp_path).train()
    with pytest.raises(ValueError, match=r"folder: .* already holds a run"):
        tiny_trainer("gpt", tmp_path).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_tokens": torch.zeros(16, dtype=torch.int64)}, "train_tokens: 16 tokens, expected at least 17"),
        ({"valid_tokens": torch.zeros(1, dtype=torch.int64)}, "valid_tokens: 1 tokens"),
        ({"train_tokens": torch.zeros(100)}, r"train_tokens: torch.float32 \[100\]"),
        ({"train_tokens": np.zeros((4, 100), dtype=np.uint16)}, r"train_tokens: uint16 \[4, 100\]"),
        ({"config": TrainingConfig(block_length=17)}, "block_length: 17, expected at most .* context_length"),
        ({"config": TrainingConfig(block_length=16, device="abacus")}, "device: 'abacus'"),
        ({"config": TrainingConfig(block_length=16, batch_size=2, carry_state=True)}, "carry_state: True"),
        ({"config": TrainingConfig(block_length=16, precision="float16", device="cpu")}, "precision: 'float16'"),
    ],
)
def test_what_does_not_fit_together_is_named(arguments: dict[str, Any], message: str) -> None:
    fields = {"train_tokens": markov_text(200), "config": TrainingConfig(block_length=16), **arguments}
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_model("gpt"), **fields)


def test_tokens_outside_the_vocabulary_are_named() -> None:
    config = TrainingConfig(block_length=16, max_steps=2)
    with pytest.raises(ValueError, match="id 8 is outside the vocabulary of 8"):
        Trainer(tiny_model("gpt"), torch.full((100,), 8), config=config).train()
