"""The JSONL log, the curves drawn from it, and progress output."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastlm.training.callbacks import EvalRecord, StepRecord
from fastlm.training.config import TrainingConfig
from fastlm.training.log import JsonlLog, TensorBoardLog, read_log
from fastlm.training.plot import MovingAverage, plot_losses
from fastlm.training.progress import ProgressBar


def _step(step: int, loss: float = 2.0) -> StepRecord:
    return StepRecord(step, loss, 1e-3, 0.5, 12_345.0, step * 0.1)


def _trainer(step: int = 0, total: int | None = 10, **config: Any) -> Any:
    return SimpleNamespace(
        step=step, total_steps=total, config=TrainingConfig(**config), seconds=step * 0.1, interrupted=False
    )


def _fill(path: Path, steps: int = 10) -> None:
    log = JsonlLog(path)
    log.on_start(_trainer())
    for step in range(1, steps + 1):
        log.on_steps(_trainer(), [_step(step, 5.0 / step)])
        if step % 5 == 0:
            log.on_evaluation(_trainer(), EvalRecord(step, 4.0 / step, 2.0, 100, True, 1.0))
    log.on_end(_trainer())


def test_records_are_on_the_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    log.on_start(_trainer())
    log.on_steps(_trainer(), [_step(1), _step(2)])
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    log.on_end(_trainer())


def test_resuming_drops_what_lies_beyond_the_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    _fill(path)
    with path.open("a") as file:
        file.write('{"step": 11, "lo')
    assert read_log(path)[-1]["step"] == 10
    log = JsonlLog(path)
    log.on_start(_trainer(step=5))
    log.on_steps(_trainer(), [_step(6, 9.0)])
    log.on_end(_trainer())
    records = read_log(path)
    assert [(r["step"], "valid_loss" in r) for r in records] == [
        *((step, False) for step in range(1, 6)),
        (5, True),
        (6, False),
    ]
    assert records[-1]["loss"] == 9.0


def test_infinity_is_null_in_json() -> None:
    assert StepRecord(1, 2.0, 1e-3, float("inf"), 1.0, 1.0).to_dict()["grad_norm"] is None


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    _fill(tmp_path / "log.jsonl")
    log = JsonlLog(tmp_path / "log.jsonl")
    log.on_start(_trainer())
    log.on_end(_trainer())
    assert read_log(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("line", ["garbage", "[1, 2]", '{"loss": 1}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        read_log(path)


def test_smoothing_of_a_constant_is_the_constant() -> None:
    average = MovingAverage()
    assert [average.add(3.0) for _ in range(50)] == pytest.approx([3.0] * 50)
    average = MovingAverage(decay=0.5)
    assert [average.add(1.0), average.add(2.0)] == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


def test_curves_of_several_runs_in_one_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    (tmp_path / "run").mkdir()
    _fill(tmp_path / "run" / "log.jsonl")
    _fill(tmp_path / "other.jsonl", 30)
    out = tmp_path / "curve.png"
    plot_losses({"one": tmp_path / "run", "two": tmp_path / "other.jsonl"}, out, baselines={"3-gram": 1.5})
    image = imread(out)
    assert image.shape[0] > 300 and image.shape[1] > 500
    assert (image[..., :3].std(axis=-1) > 0.1).sum() > 200, "no coloured lines"


def test_a_log_without_steps_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training steps"):
        plot_losses({"x": tmp_path / "log.jsonl"}, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_tensorboard_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install fastlm\[tensorboard\]"):
        TensorBoardLog(tmp_path)


def test_tensorboard_gets_the_same_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    log.on_steps(_trainer(), [_step(1, 3.0), _step(2, 2.0)])
    log.on_evaluation(_trainer(), EvalRecord(2, 1.5, 4.5, 100, True, 1.0))
    log.on_end(_trainer())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(1, 3.0), (2, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("loss/valid")] == [(2, 1.5)]


def _watch(console: Console, trainer: Any, **options: Any) -> None:
    bar = ProgressBar(console, **options)
    bar.on_start(trainer)
    trainer.step = 5
    bar.on_steps(trainer, [_step(step) for step in range(1, 6)])
    bar.on_evaluation(trainer, EvalRecord(5, 1.2345, 3.44, 100, True, 1.0))
    bar.on_end(trainer)


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    _watch(Console(file=out, width=40), _trainer(), plain_interval=0.0, label="lstm")
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and len(lines) == 2
    for part in ("lstm: 5/10", "loss 2.000 (mean 2.000)", "12.3k tokens/s", "lr 1.00e-03", "left"):
        assert part in lines[0]
    assert "step 5: validation loss 1.2345, perplexity 3.44, the best so far" in lines[1]


def test_a_live_bar_in_a_terminal() -> None:
    out = io.StringIO()
    _watch(Console(file=out, width=160, force_terminal=True), _trainer(total=None, max_steps=None, epochs=1.0))
    assert "\x1b" in out.getvalue() and "12.3k tokens/s" in out.getvalue()
