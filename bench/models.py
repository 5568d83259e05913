"""The models the cases run on, made once and kept in the user's cache: the same weights in every engine's own format.

`smollm2(kind)` is a GGUF file; ours and llama.cpp read the very same one. The kind Q4_1 is the real file; the others
are written by the `gguf` library from its dequantised weights, every matrix, embedding and head included, in that
kind. Engines without a GGUF reader get a folder made from the F32 file, whose tokens are named "t0", "t1", ... so that
no engine's tokenizer plays a part.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlm.checkpoints.pull import cache_dir, pull

__all__ = ["KINDS", "gpt2_ctranslate2", "gpt2_folder", "gpt2_gguf", "how_made", "smollm2", "smollm2_ctranslate2"]

KINDS = ("Q4_1", "Q8_0", "Q4_0", "F16", "F32")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
_GPT2_SEED = 0


def _folder() -> Path:
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file or folder `name`; made beside its place and renamed: a killed run leaves none half made."""
    target = _folder() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
            fresh = Path(scratch) / name
            make(fresh)
            os.replace(fresh, target)
    return target


def how_made(kind: str) -> str:
    """The row's note: where the file's weights come from."""
    if kind == "Q4_1":
        return "the published file: layers Q4_1, embedding and head Q8_0"
    return f"every matrix, embedding and head in {kind}, from the published file's dequantised weights"


def smollm2(kind: str) -> Path:
    """The GGUF file of SmolLM2-135M in one of `KINDS`."""
    if kind == "Q4_1":
        override = os.environ.get("FASTLM_TEST_GGUF")
        return Path(override) if override else pull("smollm2-135m")
    return _made(f"smollm2-135m-{kind}.gguf", lambda path: _convert(smollm2("Q4_1"), path, kind))


def _convert(source: Path, target: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(_FILE_TYPES[kind])
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        _add(writer, tensor.name, weights, kind if weights.ndim == 2 else "F32")
    _finish(writer)


def _add(writer: Any, name: str, weights: Any, kind: str) -> None:
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(weights, qtype), raw_dtype=qtype)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_ctranslate2(source: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    size = json.loads((source / "config.json").read_text())["vocab_size"]
    names = Tokenizer(WordLevel({f"t{index}": index for index in range(size)}, unk_token="t0"))

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return PreTrainedTokenizerFast(tokenizer_object=names, unk_token="t0", bos_token="t1", eos_token="t2")

    Converter(str(source)).convert(str(target))


def smollm2_ctranslate2() -> Path:
    """SmolLM2-135M for CTranslate2, float32: the weights of the F32 file."""

    def make(path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        file = smollm2("F32")
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        settings = read.config.to_dict()
        settings.pop("quantization_config")  # which says "read from GGUF", and that transformers won't save
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(read.state_dict())
        folder = path.with_name("folder")
        plain.save_pretrained(folder)
        _to_ctranslate2(folder, path)
        shutil.rmtree(folder)

    return _made("smollm2-135m-ctranslate2", make)


def gpt2_folder() -> Path:
    """A Hugging Face folder with the shape of GPT-2 124M and random weights, float32."""

    def make(path: Path) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(_GPT2_SEED)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(path)

    return _made("gpt2-124m", make)


def gpt2_ctranslate2() -> Path:
    """The same GPT-2 for CTranslate2, float32; it quantises to int8 while loading."""
    return _made("gpt2-124m-ctranslate2", lambda path: _to_ctranslate2(gpt2_folder(), path))


def gpt2_gguf(kind: str) -> Path:
    """The same GPT-2 as a GGUF file, all matrices but the positions in `kind`."""
    return _made(f"gpt2-124m-{kind}.gguf", lambda path: _write_gpt2(path, kind))


def _write_gpt2(path: Path, kind: str) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((gpt2_folder() / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[kind])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, weights in load_file(gpt2_folder() / "model.safetensors").items():
        if name == "lm_head.weight":
            continue  # tied to the embedding
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"GPT-2 tensor {name!r} has no name in GGUF")
        if ".c_" in name and weights.ndim == 2:
            weights = weights.T.copy()  # transformers' Conv1D keeps [in, out]
        plain = weights.ndim == 1 or target.startswith("position_embd")
        _add(writer, target, weights, "F32" if plain else kind)
    _finish(writer)
