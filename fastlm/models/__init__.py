"""The model families, one file each."""

from __future__ import annotations

from typing import Any

from fastlm.models.base import CausalLM, ModelConfig, State
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.llama import Llama, LlamaConfig
from fastlm.models.ngram import NGramLM
from fastlm.models.recurrent import LSTMLM, RNNLM, RecurrentConfig

__all__ = [
    "GPT",
    "LSTMLM",
    "RNNLM",
    "CausalLM",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "NGramLM",
    "RecurrentConfig",
    "State",
    "build",
    "config_from_dict",
]

_CONFIGS: dict[str, type[ModelConfig]] = {c.architecture: c for c in (GPTConfig, LlamaConfig, RecurrentConfig)}


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The configuration that `ModelConfig.to_dict` described.

    Raises:
        ValueError: an unknown architecture or keys, or sizes that make no model.
    """
    architecture = values.get("architecture")
    if architecture not in _CONFIGS:
        raise ValueError(f"architecture: {architecture!r} is not one of {', '.join(sorted(_CONFIGS))}")
    return _CONFIGS[architecture].from_dict(values)


def build(config: ModelConfig | dict[str, Any]) -> CausalLM:
    """A freshly initialised model of this configuration, or of its dictionary with the key "architecture".

    Raises:
        ValueError: an unknown architecture or keys, or sizes that make no model.
    """
    if isinstance(config, dict):
        config = config_from_dict(config)
    if isinstance(config, GPTConfig):
        return GPT(config)
    if isinstance(config, LlamaConfig):
        return Llama(config)
    if isinstance(config, RecurrentConfig):
        return (LSTMLM if config.cell == "lstm" else RNNLM)(config)
    raise ValueError(f"config: {type(config).__name__} is not the configuration of a known family")
