"""GGUF files with their matrices in another kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import gpt2, llama, write

from fastlm.checkpoints import CheckpointError, load_gguf
from fastlm.checkpoints.gguf import GGUFFile
from fastlm.checkpoints.requantize import requantize_gguf
from fastlm.ops import QuantizedTensor

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def stored(file: GGUFFile, name: str) -> bytes:
    tensor = file.tensors[name]
    return file.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_matrices_are_rounded_and_the_rest_is_kept(make: object, kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", make(), tokenizer=True)  # type: ignore[operator]
    requantize_gguf(source, tmp_path / "b.gguf", kind)
    before, after = GGUFFile(source), GGUFFile(tmp_path / "b.gguf")
    stale = ("general.file_type", "GGUF.tensor_count")
    assert {k: v for k, v in after.metadata.items() if k not in stale} == {
        k: v for k, v in before.metadata.items() if k not in stale
    }
    assert list(after.tensors) == list(before.tensors)
    kinds = set()
    for name, tensor in after.tensors.items():
        old = before.tensors[name]
        assert tensor.shape == old.shape
        expected = kind if len(tensor.shape) == 2 and not name.startswith("position_embd") else "F32"
        if name in ("token_embd.weight", "output.weight") and kind in ("Q4_0", "Q4_1"):
            expected = "Q8_0"
        assert tensor.kind == expected, name
        kinds.add(tensor.kind)
        values = torch.frombuffer(bytearray(stored(before, name)), dtype=torch.float32).view(old.shape)
        rounded = stored(after, name)
        if len(tensor.shape) == 2 and expected != "F32":
            assert rounded == QuantizedTensor.quantize(values, expected).data.numpy().tobytes(), name
        else:
            assert rounded == stored(before, name), name
    assert kind in kinds
    load_gguf(tmp_path / "b.gguf")


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", llama(), "Q8_0")
    with pytest.raises(ValueError, match="kind is 'Q2_K'"):
        requantize_gguf(source, tmp_path / "b.gguf", "Q2_K")
    with pytest.raises(ValueError, match="target is the source itself"):
        requantize_gguf(source, source, "Q4_0")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        requantize_gguf(damaged, tmp_path / "b.gguf", "Q4_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "damaged.gguf"]
