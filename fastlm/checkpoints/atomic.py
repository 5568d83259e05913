"""Files that are replaced as a whole or not at all.

A file is written beside its target under a temporary name, flushed to the disk, and renamed over it. A process killed
at any moment, or a full disk, leaves the previous file as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastlm.checkpoints.errors import CheckpointError

__all__ = ["save_tensors_atomic", "write_atomic", "write_json_atomic"]


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then makes what it wrote durable and renames it to `path`.

    Raises:
        CheckpointError: writing failed (full disk, no permission, ...); `path` is what it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        state = "the previous file is unchanged" if path.exists() else "nothing was written"
        raise CheckpointError(path, f"could not be written: {error}; {state}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises as `write_atomic`, and TypeError for what JSON can't hold."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors_atomic(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically: tensors of any dtype and device, and strings in its header.

    Raises as `write_atomic`.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    strings = None if metadata is None else dict(metadata)
    write_atomic(path, lambda temporary: save_file(on_cpu, temporary, metadata=strings))


def _flush_to_disk(path: Path) -> None:
    # A folder is flushed too, so that the rename itself survives a power cut; Windows can't open one.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
