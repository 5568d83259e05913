"""fastlm's own run folders: config.json, model.safetensors, tokenizer.json, fastlm.json.

model.safetensors carries the configuration, the tokenizer and the metadata in its header, and is written last. So one
rename decides between the old checkpoint and the new; the JSON files say the same to people and other tools.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm.checkpoints.atomic import save_tensors_atomic, write_atomic, write_json_atomic
from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.hf import read_safetensors
from fastlm.checkpoints.weights import Checkpoint, dense_weights, expect_match, skeleton
from fastlm.models import CausalLM, build, config_from_dict

if TYPE_CHECKING:
    from fastlm.data.tokenizer import Tokenizer

__all__ = ["FORMAT", "is_run", "load_run", "save_run"]

FORMAT = 1
_MANIFEST = "fastlm.json"
_WEIGHTS = "model.safetensors"


def is_run(folder: Path) -> bool:
    """Whether the folder is one that `save_run` wrote."""
    return (folder / _MANIFEST).is_file()


def save_run(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model, its tokenizer and `metadata` (JSON values) into a run folder, beside what else is there.

    Each file is replaced whole or not at all, the weights last: whenever the process dies, the folder holds the
    previous checkpoint or this one. Quantised weights are written as float32.

    Raises:
        CheckpointError: writing failed (full disk, no permission, ...).
        TypeError: `metadata` holds what JSON can't.
    """
    folder = Path(folder)
    config = model.config.to_dict()
    manifest = {"format": FORMAT, **(metadata or {})}
    files = {} if tokenizer is None else _tokenizer_files(tokenizer)
    for name, text in files.items():
        write_atomic(folder / name, partial(_write_text, text))
    write_json_atomic(folder / "config.json", config)
    write_json_atomic(folder / _MANIFEST, manifest)
    header = {"config": json.dumps(config), "tokenizer": json.dumps(files), "fastlm": json.dumps(manifest)}
    save_tensors_atomic(folder / _WEIGHTS, dense_weights(model), header)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(temporary)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(temporary).iterdir())}


def _tokenizer(path: Path, files: Mapping[str, str]) -> Tokenizer:
    from fastlm.data.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        for name, text in files.items():
            if Path(name).name != name:
                raise CheckpointError(path, f"has a tokenizer file {name!r}, expected a plain name")
            _write_text(text, Path(temporary) / name)
        try:
            return Tokenizer.load(temporary)
        except ValueError as error:
            raise CheckpointError(path, f"tokenizer: {error}") from error


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def load_run(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
) -> Checkpoint:
    """Loads what `save_run` wrote: trainable parameters, in eval mode, and `metadata` as it was given.

    Args:
        folder: the run folder.
        dtype: converts the parameters; None: as they were saved.
        device: where to put them; None: the CPU.
        compute: accepted as by the other loaders; a run's weights are not quantised.

    Raises:
        CheckpointError: a file is missing or damaged, or was written by a newer version, or the parts don't fit.
    """
    folder = Path(folder)
    path = folder / _WEIGHTS
    tensors, header = read_safetensors(path)
    try:
        config, files, manifest = (json.loads(header[key]) for key in ("config", "tokenizer", "fastlm"))
        version = manifest.pop("format")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            path, f"was not written by fastlm: no sound configuration in its header ({error})"
        ) from error
    if version != FORMAT:
        raise CheckpointError(path, f"has format {version!r}, this version of fastlm reads {FORMAT}")
    if not isinstance(config, dict) or not isinstance(files, dict):
        raise CheckpointError(path, f"has the configuration {config!r} and tokenizer {files!r}, expected objects")
    shapes = {
        name: tensor.shape for name, tensor in skeleton(path, lambda: config_from_dict(config)).state_dict().items()
    }
    expect_match(path, shapes, {name: tensor.shape for name, tensor in tensors.items()})
    model = build(config)
    model.load_state_dict(tensors, assign=True)
    tokenizer = _tokenizer(path, files) if files else None
    return Checkpoint(model.to(device=device, dtype=dtype).eval(), tokenizer, manifest)
