"""GGUF to GGUF, with the matrices in another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

from fastlm.checkpoints.atomic import write_atomic
from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.gguf import GGUFFile
from fastlm.reference.quantized import KINDS, quantize

__all__ = ["requantize_gguf"]

_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
_LOGITS = ("token_embd.weight", "output.weight")  # matrices whose errors go straight into the logits


def requantize_gguf(source: str | Path, target: str | Path, kind: str) -> None:
    """Writes `source` to `target`, atomically, its matrices rounded to `kind` by ggml's own rule; metadata is copied.

    Embedding and head have at least 8 bits. Vectors, learnt positions, and matrices whose width is not a whole number
    of blocks are kept as float32.

    Raises:
        ValueError: the kind is unknown, or target is source.
        CheckpointError: the source is no readable GGUF file, or the target can't be written.
    """
    source, target = Path(source), Path(target)
    if kind not in KINDS:
        raise ValueError(f"requantize_gguf: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"requantize_gguf: target is the source itself, {source}")
    GGUFFile(source)  # the library's reader trusts what it reads
    reader = GGUFReader(source)

    def write(path: Path) -> None:
        architecture: Any = reader.fields["general.architecture"].contents()
        writer = GGUFWriter(path, architecture)
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
                element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], element)
        writer.add_file_type(_FILE_TYPES[kind])
        for tensor in reader.tensors:
            weights = torch.from_numpy(
                np.array(dequantize(tensor.data, tensor.tensor_type))
            )  # a copy: the map is read-only
            chosen = _kind_of(tensor.name, weights, kind)
            data = quantize(weights, chosen).numpy()
            writer.add_tensor(tensor.name, data, raw_dtype=GGMLQuantizationType[chosen])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    if "general.architecture" not in reader.fields:
        raise CheckpointError(source, "has no general.architecture")
    write_atomic(target, write)


def _kind_of(name: str, weights: torch.Tensor, kind: str) -> str:
    if weights.dim() != 2 or name.startswith("position_embd"):
        return "F32"
    if name in _LOGITS and KINDS[kind].row_bytes(32) < KINDS["Q8_0"].row_bytes(32):
        kind = "Q8_0"
    return kind if weights.shape[1] % KINDS[kind].block == 0 else "F32"
