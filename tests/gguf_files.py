"""Small models of transformers, written as GGUF files the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

__all__ = ["VOCAB", "gpt2", "llama", "qwen2", "write"]

VOCAB = 300
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def randomized(model: Any) -> Any:
    """Weights large enough that attention is far from uniform and predictions differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and parameter.dim() == 1 else 0.12 * noise)
    return model.eval()


def llama(**options: Any) -> Any:
    """A LlamaForCausalLM with random weights."""
    return randomized(LlamaForCausalLM(LlamaConfig(**{**_SIZES, "rms_norm_eps": 1e-5, **options})))


def qwen2(**options: Any) -> Any:
    """A Qwen2ForCausalLM with random weights."""
    return randomized(Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, **options})))


def gpt2(**options: Any) -> Any:
    """A GPT2LMHeadModel with random weights."""
    sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return randomized(GPT2LMHeadModel(GPT2Config(**{**sizes, **options})))


def _adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """The converter's reordering of Llama's query and key rows."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def tensors(model: Any) -> dict[str, Tensor]:
    """The model's weights under llama.cpp's names, and in its order."""
    config, found = model.config, {}
    arch = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(arch[config.model_type], config.num_hidden_layers)
    for theirs, weight in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        if config.model_type == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            weight = _adjacent_pairs(weight, heads)
        if config.model_type == "gpt2" and weight.dim() == 2 and ("attn" in theirs or "mlp" in theirs):
            weight = weight.t()
        found[name] = weight.float().contiguous()
    return found


def tokenizer_keys(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE with two merges, a control token, and filler up to VOCAB."""
    from fastlm.data.tokenizer import Tokenizer

    alphabet = sorted(Tokenizer.byte()._backend.get_vocab(with_added_tokens=False), key=lambda c: ord(c))
    tokens = ["<|im_end|>", *alphabet, "th", "the"]
    types = [3] + [1] * (len(tokens) - 1)
    fill = VOCAB - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(fill)])
    writer.add_token_types(types + [5] * fill)
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    tokenizer: bool = False,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Writes `model`, and changes its own matrices to what the file's kind rounds them to.

    `metadata` replaces or adds keys (None leaves one out), `extra` adds float32 tensors, `without` leaves some out.
    """
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    keys: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.attention.head_count": config.num_attention_heads,
    }
    if arch == "gpt2":
        keys["gpt2.feed_forward_length"] = 4 * config.hidden_size
        keys["gpt2.attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        keys[f"{arch}.feed_forward_length"] = config.intermediate_size
        keys[f"{arch}.attention.head_count_kv"] = config.num_key_value_heads
        keys[f"{arch}.attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        keys[f"{arch}.rope.freq_base"] = config.rope_parameters["rope_theta"]
    for key, value in {**keys, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if tokenizer:
        tokenizer_keys(writer)
    code = GGMLQuantizationType[kind]
    for name, weight in tensors(model).items():
        if name in without:
            continue
        if weight.dim() == 1:
            writer.add_tensor(name, weight.numpy())
        else:
            writer.add_tensor(name, gguf.quantize(weight.numpy(), code), raw_dtype=code)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                # Blocks lie along a row as the file has it: transposed for GPT-2's linear layers.
                turned = arch == "gpt2" and parameter is not model.transformer.wte.weight
                turned = turned and parameter is not model.transformer.wpe.weight
                rows = (parameter.t() if turned else parameter).float().contiguous().numpy()
                rounded = torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(rows, code), code)))
                parameter.copy_(rounded.t() if turned else rounded)
    return path
