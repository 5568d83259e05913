"""Hugging Face folders of the GPT-2 and Llama families: config.json with model.safetensors, or shards and an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm.checkpoints.atomic import save_tensors_atomic, write_json_atomic
from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.weights import (
    Checkpoint,
    Weight,
    dense_weights,
    expect_match,
    install,
    is_linear,
    skeleton,
    translate,
)
from fastlm.kernels.cpu.memory import in_huge_pages
from fastlm.models import GPT, CausalLM, GPTConfig, Llama, LlamaConfig, ModelConfig
from fastlm.ops.quantized import QuantizedTensor

if TYPE_CHECKING:
    from fastlm.data.tokenizer import Tokenizer

__all__ = ["expect_family", "from_state", "load_hf", "read_json", "read_safetensors", "save_hf"]

_GPT = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "layers.N.attention_norm": "transformer.h.N.ln_1",
    "layers.N.attention.qkv": "transformer.h.N.attn.c_attn",
    "layers.N.attention.output": "transformer.h.N.attn.c_proj",
    "layers.N.mlp_norm": "transformer.h.N.ln_2",
    "layers.N.mlp.up": "transformer.h.N.mlp.c_fc",
    "layers.N.mlp.down": "transformer.h.N.mlp.c_proj",
}
_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.query": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.key": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.value": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.output": "model.layers.N.self_attn.o_proj",
    "layers.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.mlp.gate": "model.layers.N.mlp.gate_proj",
    "layers.N.mlp.up": "model.layers.N.mlp.up_proj",
    "layers.N.mlp.down": "model.layers.N.mlp.down_proj",
}
# Buffers that older versions of transformers saved among the weights.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError: the file can't be read, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"can't be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"holds a {type(value).__name__}, expected an object")
    return value


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and the strings in its header.

    Raises:
        CheckpointError: the file can't be read, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(path, f"is no sound safetensors file: {error}") from error


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of the folder, and the file to blame for what is wrong with them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return single, read_safetensors(single)[0]
    if not index.exists():
        found = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if found:
            raise CheckpointError(
                folder,
                f"has its weights in {found[0]}, a pickle: loading one can run any code, so it is refused. "
                "Convert it with save_pretrained, which writes model.safetensors",
            )
        raise CheckpointError(folder, f"has neither {single.name} nor {index.name}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(index, "has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise CheckpointError(index, f"weight_map leads to {name!r}, expected a .safetensors file beside the index")
        tensors.update(read_safetensors(folder / name)[0])
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise CheckpointError(index, f"weight_map names {absent[0]!r}, but {places[absent[0]]} does not hold it")
    return index, tensors


class _Reader:
    """Typed look-ups in a config.json."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of `key`, null counting as absent. CheckpointError: of another type, or missing with no default."""
        value = self.values.get(key)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise CheckpointError(self.path, f"{key} is {value!r}, expected {names}")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """CheckpointError unless `key` is absent or one of these."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(self.path, f"{key} is {value!r}, supported are {', '.join(map(repr, allowed))}")


def _gpt_config(config: _Reader) -> GPTConfig:
    config.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("add_cross_attention", False)
    return GPTConfig(
        vocab_size=config.get("vocab_size", int),
        context_length=config.get("n_positions", int),
        num_layers=config.get("n_layer", int),
        num_heads=config.get("n_head", int),
        hidden_size=config.get("n_embd", int),
        intermediate_size=config.get("n_inner", int, None),
        dropout=config.get("resid_pdrop", (float, int), 0.1),
        tie_embeddings=config.get("tie_word_embeddings", bool, True),
        layer_norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
    )


def _llama_config(config: _Reader) -> LlamaConfig:
    config.expect("hidden_act", "silu")
    kind = config.get("model_type", str)
    # transformers 5 keeps theta and scaling together, earlier ones apart.
    rope = dict(config.get("rope_parameters", dict, None) or config.get("rope_scaling", dict, {}))
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", (float, int), 10000.0)
    head_dim = config.get("head_dim", int, None)
    part = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor", float, 1.0)
    heads, hidden = config.get("num_attention_heads", int), config.get("hidden_size", int)
    window = config.get("sliding_window", int, None)
    if kind == "qwen2":
        if config.get("use_sliding_window", bool, False):
            raise CheckpointError(config.path, "use_sliding_window is True, which differs by layer: not supported")
        window = None
    biases = config.get("attention_bias", bool, False)
    return LlamaConfig(
        vocab_size=config.get("vocab_size", int),
        context_length=config.get("max_position_embeddings", int),
        num_layers=config.get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", int, None),
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=config.get("intermediate_size", int),
        rope_theta=float(theta),
        rope_dim=None if part == 1.0 else int(part * (head_dim or hidden // heads)),
        rope_scaling=rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None,
        rms_norm_eps=config.get("rms_norm_eps", float, 1e-6),
        qkv_bias=biases or kind == "qwen2",
        output_bias=biases,
        mlp_bias=config.get("mlp_bias", bool, False),
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        window=window,
    )


_FAMILIES = {"gpt2": (_gpt_config, _GPT), "llama": (_llama_config, _LLAMA)}
_FAMILIES["mistral"] = _FAMILIES["qwen2"] = _FAMILIES["llama"]


def load_hf(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
) -> Checkpoint:
    """Loads a folder of model_type gpt2, llama, mistral or qwen2, with its tokenizer where it has one.

    Args:
        folder: holds config.json, model.safetensors (or its shards), tokenizer files.
        dtype: None keeps weights as they are stored, 16-bit matrices frozen; else trainable parameters of it.
        device: where to put the weights; None: the CPU.
        compute: "fast" or "exact", as in `fastlm.ops.linear`.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not supported or does not fit its configuration.
    """
    from fastlm.data.tokenizer import Tokenizer

    folder = Path(folder)
    config = folder / "config.json"
    values = read_json(config)
    expect_family(values, config)
    path, tensors = _read_weights(folder)
    # Products on this CPU read huge pages faster than the mapped file, which goes with these tensors.
    shared = dtype is not None or torch.device(device or "cpu").type != "cpu"
    model = from_state(
        values, tensors, dtype=dtype, device=device, compute=compute, config_path=config, path=path, shared=shared
    )
    tokenizer = None
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        try:
            tokenizer = Tokenizer.from_hf(folder)
        except ValueError as error:
            raise CheckpointError(folder, f"tokenizer: {error}") from error
    return Checkpoint(model, tokenizer, values)


def expect_family(values: Mapping[str, Any], path: Path) -> None:
    """CheckpointError: the configuration is not of one of the families that are read here."""
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise CheckpointError(path, f"model_type is {kind!r}, expected one of {', '.join(_FAMILIES)}")


def from_state(
    values: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
    config_path: Path = Path("config"),
    path: Path = Path("state_dict"),
    kind: str | None = None,
    shared: bool = True,
) -> CausalLM:
    """The model of a configuration and weights as transformers has them: `config.to_dict()` and `state_dict()`.

    Args:
        kind: quantise matrices to this kind ("Q8_0", ...); None leaves them.
        shared: the weights' memory is shared where neither dtype nor layout changes; False: all are copied.
        config_path, path: whom errors blame.

    Raises:
        CheckpointError: as `load_hf`; a matrix cannot be quantised to `kind`.
    """
    reader = _Reader(config_path, values)
    expect_family(values, config_path)
    family = values["model_type"]
    make_config, modules = _FAMILIES[family]
    model = skeleton(config_path, lambda: make_config(reader))
    names = {ours: translate(ours, modules) for ours in model.state_dict()}
    # The bare model, saved without its head, has names without the first part.
    prefix = modules["norm"].split(".")[0] + "."
    tensors = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not _BUFFERS.search(n)}
    if model.output is None:
        tensors.pop("lm_head.weight", None)
    transposed = {names[n] for n in names if family == "gpt2" and n != "output.weight" and is_linear(model, n)}
    expected = {names[ours]: list(tensor.shape) for ours, tensor in model.state_dict().items()}
    for name in transposed:
        expected[name].reverse()
    expect_match(path, expected, {name: tensor.shape for name, tensor in tensors.items()})
    wrong = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _DTYPES]
    if wrong:
        raise CheckpointError(path, f"tensor {wrong[0]}, expected one of {', '.join(map(str, _DTYPES))}")
    # GPT-2's linear layers are stored as [in, out].
    weights: dict[str, Weight] = {
        ours: tensors[theirs].t().contiguous() if theirs in transposed else tensors[theirs]
        for ours, theirs in names.items()
    }
    if not shared:
        weights = {name: in_huge_pages(tensor) for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    if kind is not None:
        for name, weight in weights.items():
            if isinstance(weight, Tensor) and (is_linear(model, name) or name == "embedding.weight"):
                try:
                    weights[name] = QuantizedTensor.quantize(weight, kind)
                except ValueError as error:
                    raise CheckpointError(path, f"{names[name]}: {error}") from error
    return install(model, weights, dtype=dtype, device=device, compute=compute)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_hf(model: CausalLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a GPT or Llama as a folder that transformers' AutoModelForCausalLM loads; quantised weights as float32.

    Raises:
        ValueError: the model is of another family, or has something transformers' configuration can't express.
        CheckpointError: writing failed.
    """
    folder = Path(folder)
    config: ModelConfig = model.config
    dense = dense_weights(model)
    if isinstance(model, GPT):
        modules, values = _GPT, _gpt_values(model.config)
        dense = {n: t.t() if n != "output.weight" and is_linear(model, n) else t for n, t in dense.items()}
    elif isinstance(model, Llama):
        modules, values = _LLAMA, _llama_values(model.config)
        if model.config.rope_interleaved:
            dense = {n: _halves(model.config, t) if _ROTATED.search(n) else t for n, t in dense.items()}
    else:
        raise ValueError(f"save_hf: model is a {type(model).__name__}, expected GPT or Llama")
    tensors = {translate(name, modules): tensor for name, tensor in dense.items()}
    values |= {"vocab_size": config.vocab_size, "dtype": str(next(iter(dense.values())).dtype).removeprefix("torch.")}
    if tokenizer is not None:
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        tokenizer.save(folder)
    write_json_atomic(folder / "config.json", values)
    save_tensors_atomic(folder / "model.safetensors", tensors, {"format": "pt"})


_ROTATED = re.compile(r"\.attention\.(query|key)\.(weight|bias)$")


def _halves(config: LlamaConfig, rows: Tensor) -> Tensor:
    """Query or key rows from the order in which adjacent pairs rotate to that in which halves do."""
    if config.rope_dim not in (None, config.head_size):
        raise ValueError(f"save_hf: rope_dim {config.rope_dim} of {config.head_size} interleaved can't be expressed")
    return rows.unflatten(0, (-1, config.head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _gpt_values(config: GPTConfig) -> dict[str, Any]:
    if not config.bias:
        raise ValueError("save_hf: bias is False, which GPT-2's configuration can't express")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama_values(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling or {"rope_type": "default"}
    qwen2 = config.qkv_bias and not config.output_bias
    odd = {
        "rope_scaling": scaling.get("rope_type", scaling.get("type")) not in ("default", "linear", "llama3"),
        "rope_dim": config.rope_dim not in (None, config.head_size),
        "output_bias": config.output_bias and not config.qkv_bias,
        "mlp_bias": config.mlp_bias and (qwen2 or config.window is not None),
        "window": config.window is not None and config.qkv_bias,
    }
    for name, is_odd in odd.items():
        if is_odd:
            raise ValueError(
                f"save_hf: {name}={getattr(config, name)} can't be expressed in transformers' configuration"
            )
    kind, architecture = ("qwen2", "Qwen2ForCausalLM") if qwen2 else ("llama", "LlamaForCausalLM")
    if config.window is not None:
        kind, architecture = "mistral", "MistralForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": kind,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        # Both forms, for transformers before and since version 5.
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.window,
        "bos_token_id": None,
        "eos_token_id": None,
    }
