"""Reads and writes models: GGUF files, Hugging Face folders, fastlm's own run folders. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastlm.checkpoints.atomic import save_tensors_atomic, write_json_atomic
from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.gguf import load_gguf
from fastlm.checkpoints.hf import load_hf, save_hf
from fastlm.checkpoints.run import is_run, load_run, save_run
from fastlm.checkpoints.weights import Checkpoint
from fastlm.ops.checks import usable_device

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_gguf",
    "load_hf",
    "load_run",
    "save_hf",
    "save_run",
    "save_tensors_atomic",
    "write_json_atomic",
]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
) -> Checkpoint:
    """Loads a model from a GGUF file, a folder with one, a Hugging Face folder, or a fastlm run folder.

    Args:
        path: the file or folder.
        dtype: None keeps the precision the weights are stored in, on native kernels; else trainable parameters of it.
        device: where to put the weights, "auto" for a GPU if there is one; None: the CPU.
        compute: "fast" (integer products where they pay) or "exact" (float32 against dequantised weights).

    Raises:
        CheckpointError: it is none of these, damaged, or holds a model that is not supported.
        ValueError: `compute` is neither "fast" nor "exact", `dtype` is no floating dtype, or torch can't use `device`.
    """
    path = Path(path)
    if compute not in ("fast", "exact"):
        raise ValueError(f"compute: {compute!r}, expected 'fast' or 'exact'")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}, expected a floating dtype or None")
    device = None if device is None else usable_device(device)
    if not path.exists():
        raise CheckpointError(path, "does not exist")
    loader: Callable[..., Checkpoint] = load_gguf
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if is_run(path):
            loader = load_run
        elif (path / "config.json").is_file():
            loader = load_hf
        elif len(files) == 1:
            path = files[0]
        else:
            raise CheckpointError(
                path, f"is no model: no fastlm.json, no config.json, and {len(files)} .gguf files where one would do"
            )
    elif path.suffix == ".safetensors":
        raise CheckpointError(path, "is only the weights; give the folder it is in")
    return loader(path, dtype=dtype, device=device, compute=compute)
