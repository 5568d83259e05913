"""A resumed run has the very losses of an uninterrupted one; leaving any part of its state out is seen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import losses, markov_text, tiny_model, tiny_trainer

from fastlm.checkpoints.errors import CheckpointError
from fastlm.training import Callback, EvalRecord, Trainer, batches, optimisation, read_log, resume


class _Crash(Callback):
    def on_evaluation(self, trainer: Trainer, record: EvalRecord) -> None:
        if record.step == 15:
            raise ZeroDivisionError


def _crash_and_resume(kind: str, folder: Path, **config: Any) -> list[tuple[Any, ...]]:
    """Dies at step 15, before its checkpoint; goes on from step 10 in a new trainer."""
    with pytest.raises(ZeroDivisionError):
        tiny_trainer(kind, folder, _Crash(), **config).train()
    assert [path.name for path in resume.checkpoints(folder)] == ["step-00000005", "step-00000010"]
    run = tiny_trainer(kind, folder, **config)
    torch.rand(7)  # a new process would have another generator state
    assert run.resume().step == 10
    run.train()
    return losses(folder)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt", {}),
        ("gpt", {"precision": "bfloat16"}),
        ("gpt", {"optimizer": "sgd", "nesterov": True, "accumulation": 2}),
        ("gpt", {"optimizer": "muon", "schedule": "linear", "precision": "bfloat16"}),
        ("lstm", {}),
        ("lstm", {"accumulation": 2, "clip_norm": None}),
        ("lstm", {"carry_state": False}),
        ("gru", {"optimizer": "adam"}),
    ],
)
def test_resumed_losses_are_the_same_bit_for_bit(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    resumed = _crash_and_resume(kind, tmp_path / "a", **config)
    tiny_trainer(kind, tmp_path / "b", **config).train()
    assert resumed == losses(tmp_path / "b")
    assert len(resumed) == 24


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("gpt", torch, "set_rng_state"),
        ("lstm", torch, "set_rng_state"),
        ("lstm", batches.CarriedBlocks, "load_state_tensors"),
        ("gpt", optimisation, "load_state_tensors"),
    ],
)
def test_a_part_that_is_not_restored_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: Any, name: str
) -> None:
    monkeypatch.setattr(target, name, lambda *_: None)
    resumed = _crash_and_resume(kind, tmp_path / "a")
    tiny_trainer(kind, tmp_path / "b").train()
    assert resumed[:12] == losses(tmp_path / "b")[:12]
    assert resumed != losses(tmp_path / "b")


def test_a_longer_run_may_follow(tmp_path: Path) -> None:
    tiny_trainer("gpt", tmp_path).train()
    result = tiny_trainer("gpt", tmp_path, max_steps=25).resume().train()
    assert result.steps == 25
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl") if "loss" in r] == list(range(1, 26))


def test_what_must_not_change_is_named(tmp_path: Path) -> None:
    tiny_trainer("lstm", tmp_path, max_steps=5).train()
    for change in (
        {"seed": 2},
        {"batch_size": 8},
        {"block_length": 8},
        {"optimizer": "sgd"},
        {"precision": "bfloat16"},
        {"carry_state": False},
    ):
        with pytest.raises(ValueError, match=rf"^{next(iter(change))}: .*step-00000005"):
            tiny_trainer("lstm", tmp_path, **change).resume()
    with pytest.raises(ValueError, match=r"^model: "):
        tiny_trainer("gru", tmp_path).resume()
    config = tiny_trainer("lstm").config
    with pytest.raises(ValueError, match=r"^data: .*tokens, crc"):
        Trainer(tiny_model("lstm"), markov_text(700, seed=9), None, config, tmp_path).resume()


def test_a_checkpoint_that_lacks_something_is_named(tmp_path: Path) -> None:
    tiny_trainer("gpt", tmp_path, max_steps=5).train()
    path = resume.checkpoints(tmp_path)[-1] / resume.META
    meta = json.loads(path.read_text())
    del meta["best_loss"]
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"step-00000005: 'best_loss' is missing"):
        tiny_trainer("gpt", tmp_path).resume()


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        tiny_trainer("gpt", tmp_path).resume()
    with pytest.raises(ValueError, match="folder: None"):
        tiny_trainer("gpt").resume()


def test_a_checkpoint_is_a_model_that_can_be_loaded(tmp_path: Path) -> None:
    from fastlm.checkpoints import load

    run = tiny_trainer("gpt", tmp_path)
    run.train()
    saved = load(resume.checkpoints(tmp_path)[-1]).model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in run.model.state_dict().items())


# kill -9: the real thing, in a process of its own.

_STEPS = 40
_KINDS = ("gpt", "lstm")
_SCRIPT = f"""
import os, signal, sys
from pathlib import Path
import torch
from training.runs import tiny_trainer
from fastlm.training import resume

kill_at_rename, count, replace = int(sys.argv[2]), 0, os.replace
def dying_replace(source, target):
    global count
    count += 1
    if count == kill_at_rename:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying_replace
torch.set_num_threads(2)
print("ready", flush=True)
for kind in {_KINDS}:
    folder = Path(sys.argv[1]) / kind
    run = tiny_trainer(kind, folder, max_steps={_STEPS})
    if resume.checkpoints(folder):
        run.resume()
    run.train()
"""


def _start(folder: Path, kill_at_rename: int = 0) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_WAIT_POLICY": "passive"}
    arguments = [sys.executable, "-c", _SCRIPT, str(folder), str(kill_at_rename)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def _kill_and_compare(tmp_path: Path, last_renames: list[int], pauses: list[float]) -> None:
    """Dies before each of these renames, then after each of these pauses; in the end the log is as if it never had."""
    print(f"killed at renames {last_renames}, then after {pauses} s")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for kind in _KINDS:
            tiny_trainer(kind, tmp_path / "b" / kind, max_steps=_STEPS).train()
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path / "a"
    for last_rename in last_renames:
        assert _start(folder, last_rename).wait(timeout=120) == -signal.SIGKILL
    assert resume.checkpoints(folder / "gpt"), "it should have died after its first checkpoint"
    for pause in pauses:
        process = _start(folder)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(pause)
        process.kill()
        process.wait(timeout=120)
    assert _start(folder).wait(timeout=120) == 0
    for kind in _KINDS:
        assert losses(folder / kind) == losses(tmp_path / "b" / kind)
    assert not list(folder.rglob("*.tmp*"))


def test_the_same_losses_after_kill_9(tmp_path: Path) -> None:
    """Killed twice somewhere inside the writing of a checkpoint or best model, once anywhere at all."""
    # Each evaluation with its checkpoint renames 5 to 8 files, so the first kill falls into the first model's run.
    _kill_and_compare(tmp_path, [random.randint(12, 40), random.randint(2, 45)], [random.uniform(0.0, 1.0)])


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(5))
def test_the_same_losses_after_many_kills(tmp_path: Path, repetition: int) -> None:
    renames = [random.randint(12, 20), *(random.randint(2, 12) for _ in range(5))]
    _kill_and_compare(tmp_path, renames, [random.uniform(0.0, 0.5) for _ in range(4)])
