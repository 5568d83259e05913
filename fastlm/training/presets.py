"""Model sizes by name, and training choices that suit them: a start for people who don't want to choose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Preset = Literal["tiny", "small", "medium", "large"]
PRESETS: tuple[Preset, ...] = ("tiny", "small", "medium", "large")
MODELS = ("gpt", "modern", "llama", "lstm", "gru", "rnn")
_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "tanh"}

# (layers, heads, width, context). gpt medium is GPT-2's smallest; small is nanoGPT's for Shakespeare by characters.
_ATTENTION = {
    "tiny": (4, 4, 128, 128),
    "small": (6, 6, 384, 256),
    "medium": (12, 12, 768, 1024),
    "large": (24, 16, 1024, 1024),
}
# (layers, width, embedding). medium and large: Zaremba et al. 2014's medium, Merity et al. 2017's AWD-LSTM.
_RECURRENT = {"tiny": (1, 256, 256), "small": (2, 512, 256), "medium": (2, 650, 650), "large": (3, 1150, 400)}
_LEARNING_RATE = {"tiny": 2e-3, "small": 1e-3, "medium": 6e-4, "large": 3e-4}

# Muon takes higher rates than AdamW and needs next to no warm-up; a rate that falls in a line to zero does best
# (Bergsma et al., 2025, https://arxiv.org/abs/2502.15938). What was tried: docs/performance.md.
_MUON = {
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "min_learning_rate": 0.0,
    "schedule": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
}


def model_config(
    model: str,
    preset: Preset,
    vocab_size: int,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    context: int | None = None,
    embedding: int | None = None,
    dropout: float | None = None,
) -> dict[str, Any]:
    """A configuration for `fastlm.models.build`.

    Args:
        model: "gpt", "modern" (a GPT with rotary positions, normalised queries and keys, an output layer of its own and
            no biases: with `training_defaults` it reaches a loss in a fraction of a gpt's steps), "llama", "lstm",
            "gru", "rnn", or a JSON file with a configuration; the file's `vocab_size` may
            be missing, and no size may be given besides.
        preset: the sizes to start from.
        vocab_size: the tokenizer's.
        layers, width, heads, context, embedding, dropout: replace the preset's.

    Raises `ValueError` naming the option that is unknown, of no use to this model, or does not fit the others.
    """
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context, "embedding": embedding}
    given = {name: value for name, value in {**sizes, "dropout": dropout}.items() if value is not None}
    if model.endswith(".json"):
        return _from_file(Path(model), vocab_size, given)
    if model not in MODELS:
        raise ValueError(f"model: {model!r}, expected {', '.join(MODELS)} or a .json file")
    if model in _CELLS:
        _refuse(given, ("heads", "context"), model)
        default_layers, default_width, default_embedding = _RECURRENT[preset]
        rate = 0.0 if dropout is None else dropout
        return {
            "architecture": "recurrent",
            "cell": _CELLS[model],
            "vocab_size": vocab_size,
            "num_layers": layers or default_layers,
            "hidden_size": width or default_width,
            "embedding_size": embedding or width or default_embedding,
            "input_dropout": rate,
            "hidden_dropout": rate,
            "output_dropout": rate,
        }
    _refuse(given, ("embedding",), model)
    default_layers, default_heads, default_width, default_context = _ATTENTION[preset]
    width, heads = width or default_width, heads or default_heads
    if width % heads:
        raise ValueError(f"heads: {heads}, expected a divisor of width ({width})")
    config = {
        "architecture": "gpt" if model == "modern" else model,
        "vocab_size": vocab_size,
        "context_length": context or default_context,
        "num_layers": layers or default_layers,
        "num_heads": heads,
        "hidden_size": width,
    }
    if model in ("gpt", "modern"):
        modern = {"bias": False, "tie_embeddings": False, "rope_theta": 10000.0, "qk_norm": True}
        return {**config, "dropout": dropout or 0.0, **(modern if model == "modern" else {})}
    _refuse(given, ("dropout",), model)
    # SwiGLU has three matrices: 8/3 of the width keeps the parameters of the usual two at 4 (Shazeer 2020).
    return {**config, "num_kv_heads": heads, "intermediate_size": -(-width * 8 // 3 // 64) * 64}


def training_defaults(config: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Fields of `TrainingConfig` that suit the model."""
    rate = _LEARNING_RATE[preset]
    if config["architecture"] == "recurrent":
        return {"learning_rate": 1.5 * rate, "block_length": 64, "batch_size": 16}
    defaults = {"learning_rate": rate, "block_length": min(int(config["context_length"]), 256), "batch_size": 16}
    return {**defaults, **_MUON} if config.get("qk_norm") else defaults


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], model: str) -> None:
    for name in names:
        if name in given:
            raise ValueError(f"{name}: {given[name]}, expected none: a {model} model has no such size")


def _from_file(path: Path, vocab_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        raise ValueError(f"{name}: {value}, expected none: {path} has the sizes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path} can't be read: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"model: {path} has no 'architecture', expected a JSON object that names one")
    if config.setdefault("vocab_size", vocab_size) < vocab_size:
        raise ValueError(
            f"model: {path} has vocab_size {config['vocab_size']}, expected at least the tokenizer's {vocab_size}"
        )
    return config
