"""Checkpoint folders: complete or absent, the last k kept, whatever happens while one is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from fastlm.checkpoints.errors import CheckpointError
from fastlm.training import resume


def _write(run: Path, step: int, keep: int = 2) -> Path:
    snapshot = resume.Snapshot(step, {"x": torch.full((3,), float(step))}, {"note": "ü"})
    return resume.write(run, snapshot, lambda folder: (folder / "model").write_text(f"model {step}"), keep=keep)


def test_the_last_k_are_kept_and_read_back(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000):
        path = _write(tmp_path, step)
    assert [p.name for p in resume.checkpoints(tmp_path)] == ["step-00000010", "step-100000000"]
    snapshot = resume.read(path)
    assert snapshot.step == 100_000_000
    assert snapshot.meta["note"] == "ü"
    assert torch.equal(snapshot.tensors["x"], torch.full((3,), 1e8))
    assert (path / "model").read_text() == "model 100000000"


def test_the_same_step_may_be_written_again(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    assert resume.read(_write(tmp_path, 5)).step == 5


@pytest.mark.parametrize("fails", ["model", "tensors", "rename"])
def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    good = _write(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_model = full if fails == "model" else lambda folder: None
    if fails == "tensors":
        monkeypatch.setattr("fastlm.checkpoints.atomic.save_file", lambda *a, **k: full())
    if fails == "rename":
        monkeypatch.setattr(resume.os, "rename", full)
    snapshot = resume.Snapshot(10, {"x": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match=r"step-00000010.*No space left.*step-00000005"):
        resume.write(tmp_path, snapshot, save_model, keep=2)
    monkeypatch.undo()
    assert resume.checkpoints(tmp_path) == [good]
    assert resume.read(good).step == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"], "leftovers"


def test_a_file_where_the_run_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        _write(tmp_path / "run", 1)


def test_leftovers_of_a_killed_writer_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    good = _write(tmp_path, 5)
    half = tmp_path / "checkpoints" / ".step-00000007.123.tmp"
    half.mkdir()
    (tmp_path / ".fastlm.json.123.tmp").write_text("{")
    (tmp_path / ".tmpwM7lMz").write_text("half a safetensors file")
    (tmp_path / "log.jsonl").write_text("")
    assert resume.checkpoints(tmp_path) == [good]
    resume.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "log.jsonl"]
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


@pytest.mark.parametrize("damage", ["meta gone", "meta torn", "meta foreign", "tensors cut"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path, 5)
    if damage == "meta gone":
        (path / resume.META).unlink()
    elif damage == "meta torn":
        (path / resume.META).write_text('{"format": 1, "st')
    elif damage == "meta foreign":
        (path / resume.META).write_text('{"format": 99, "step": 1}')
    else:
        data = (path / resume.TENSORS).read_bytes()
        (path / resume.TENSORS).write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match=resume.TENSORS if damage == "tensors cut" else resume.META):
        resume.read(path)
