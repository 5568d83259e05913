"""Presets build models of the advertised size; precision is chosen by what the hardware can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.models import build
from fastlm.training import TrainingConfig, precision
from fastlm.training.presets import MODELS, PRESETS, model_config, training_defaults


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model_and_a_valid_config(model: str, preset: Any) -> None:
    config = model_config(model, preset, 1000)
    with torch.device("meta"):
        built = build(config)
    assert built.config.vocab_size == 1000
    TrainingConfig.from_dict(training_defaults(config, preset))


def test_advertised_sizes_of_gpt_and_llama() -> None:
    for model in ("gpt", "llama"):
        for preset, millions in zip(PRESETS, (0.8, 11, 85, 302), strict=True):
            with torch.device("meta"):
                layers = build(model_config(model, preset, 1000)).layers  # type: ignore[union-attr]
            count = sum(parameter.numel() for parameter in layers.parameters())  # type: ignore[union-attr]
            assert count / 1e6 == pytest.approx(millions, rel=0.08)


def test_options_replace_the_presets() -> None:
    config = model_config("lstm", "tiny", 50, layers=3, width=48, dropout=0.4)
    assert (config["num_layers"], config["hidden_size"], config["embedding_size"]) == (3, 48, 48)
    assert config["hidden_dropout"] == 0.4 and config["cell"] == "lstm"
    assert model_config("rnn", "tiny", 50)["cell"] == "tanh"
    assert model_config("gpt", "small", 50, context=32)["context_length"] == 32
    assert training_defaults(model_config("gpt", "small", 50, context=32), "small")["block_length"] == 32


def test_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architecture": "gpt", "num_layers": 1, "num_heads": 1, "hidden_size": 8}))
    assert model_config(str(path), "tiny", 70)["vocab_size"] == 70
    with pytest.raises(ValueError, match="layers: 2, expected none"):
        model_config(str(path), "tiny", 70, layers=2)
    path.write_text(json.dumps({"architecture": "gpt", "vocab_size": 69}))
    with pytest.raises(ValueError, match="vocab_size 69, expected at least the tokenizer's 70"):
        model_config(str(path), "tiny", 70)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no 'architecture'"):
        model_config(str(path), "tiny", 70)
    with pytest.raises(ValueError, match=r"nowhere\.json can't be read"):
        model_config("nowhere.json", "tiny", 70)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("transformer", {}, "model: 'transformer', expected gpt"),
        ("lstm", {"heads": 4}, "heads: 4, expected none: a lstm model"),
        ("gru", {"context": 64}, "context: 64, expected none"),
        ("gpt", {"embedding": 64}, "embedding: 64, expected none"),
        ("llama", {"dropout": 0.1}, "dropout: 0.1, expected none"),
        ("gpt", {"heads": 3}, r"heads: 3, expected a divisor of width \(128\)"),
    ],
)
def test_options_that_do_not_fit_are_named(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(model, "tiny", 100, **options)


def test_automatic_precision_is_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for fast, width, expected in (
        (True, 768, "bfloat16"),
        (True, 128, "bfloat16"),
        (True, 64, "float32"),
        (True, None, "float32"),
        (False, 768, "float32"),
    ):
        monkeypatch.setattr(precision, "cpu_has_fast_bfloat16", lambda fast=fast: fast)
        assert precision.choose("auto", cpu, width=width) == expected
    assert precision.choose("bfloat16", cpu, width=None) == "bfloat16"


def test_automatic_precision_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision.choose("auto", torch.device("cuda"), width=128) == expected


def test_the_probe_of_the_cpu_agrees_with_the_system() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx512_bf16" not in flags.read_text():
        pytest.skip("needs Linux on a processor with AVX512-BF16")
    assert precision.cpu_has_fast_bfloat16()
