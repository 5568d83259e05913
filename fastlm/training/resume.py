"""Checkpoints of a training run: a folder per step, complete or absent, the last few kept.

    <run>/checkpoints/step-00000500/   a run folder in itself (`fastlm generate -m` reads it), with besides:
        training.safetensors           optimiser state, carried recurrent state, random-number generator state
        training.json                  step, best loss, configuration, ...

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a process killed at any moment or a
full disk leaves the previous ones as they were. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlm.checkpoints.atomic import save_tensors_atomic, write_json_atomic
from fastlm.checkpoints.errors import CheckpointError

FORMAT = 1
FOLDER = "checkpoints"
TENSORS = "training.safetensors"
META = "training.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Snapshot:
    """What training needs besides the model to go on exactly where it was; `meta` is JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folder = Path(run) / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write(run: str | Path, snapshot: Snapshot, save_model: Callable[[Path], object], keep: int) -> Path:
    """Writes a checkpoint, deletes all but the last `keep`, and returns its folder.

    `save_model` writes the model's files into the folder it gets. Raises `CheckpointError` where writing fails; the
    checkpoints before are then as they were.
    """
    folder = Path(run) / FOLDER
    final = folder / f"step-{snapshot.step:08}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_model(temporary)
        save_tensors_atomic(temporary / TENSORS, snapshot.tensors)
        write_json_atomic(temporary / META, {"format": FORMAT, "step": snapshot.step, **snapshot.meta})
        if final.exists():  # the same step again, after a resume that changed nothing
            shutil.rmtree(final)
        os.rename(temporary, final)
        _flush_folder(folder)
    except (OSError, ValueError) as error:
        kept = checkpoints(run)
        problem = error.__cause__ if isinstance(error, CheckpointError) else error
        state = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(final, f"could not be written: {problem}; {state}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run)[:-keep]:
        # Renamed first: a checkpoint deleted halfway must not look complete.
        doomed = old.with_name(f".{old.name}.{os.getpid()}.tmp")
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return final


def read(checkpoint: str | Path) -> Snapshot:
    """Reads what `write` stored besides the model. Raises `CheckpointError` naming the file and what is wrong."""
    path = Path(checkpoint) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("step"), int):
            raise CheckpointError(path, f"expected a training checkpoint of format {FORMAT}")
        path = Path(checkpoint) / TENSORS
        tensors = load_file(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(path, f"could not be read: {error}") from error
    return Snapshot(step=meta["step"], tensors=tensors, meta=meta)


def remove_leftovers(run: str | Path) -> None:
    """Deletes what a killed process had begun to write into a run folder. No other process may be writing there."""
    for path in (*Path(run, FOLDER).glob(".step-*.tmp"), *Path(run).glob(".tokenizer.*")):
        shutil.rmtree(path, ignore_errors=True)
    # The second pattern is that of the safetensors library, which writes through a temporary file of its own.
    for path in (*Path(run).glob(".*.tmp"), *Path(run).glob(".tmp" + "[A-Za-z0-9]" * 6)):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
