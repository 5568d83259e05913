"""Run folders: what was saved comes back; a kill or a full disk at any point loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlm import checkpoints
from fastlm.checkpoints import CheckpointError, load_run, save_run
from fastlm.data.tokenizer import Tokenizer
from fastlm.models import CausalLM, GPTConfig, LlamaConfig, RecurrentConfig, build
from fastlm.models.base import ModelConfig

CONFIGS: list[ModelConfig] = [
    GPTConfig(vocab_size=257, context_length=16, num_layers=1, num_heads=2, hidden_size=16),
    LlamaConfig(vocab_size=257, context_length=16, num_layers=1, num_heads=2, hidden_size=16, intermediate_size=24),
    RecurrentConfig(vocab_size=257, embedding_size=12, hidden_size=16, num_layers=2),
    RecurrentConfig(vocab_size=257, embedding_size=12, hidden_size=16, num_layers=1, cell="gru", tie_embeddings=False),
]


def same_weights(a: CausalLM, b: CausalLM) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    metadata = {"step": 7, "note": "ü", "losses": [1.5, None]}
    save_run(model, tmp_path / "run", Tokenizer.byte(), metadata)
    found = checkpoints.load(tmp_path / "run")
    assert found.model.config == config and same_weights(found.model, model)
    assert not found.model.training and all(p.requires_grad for p in found.model.parameters())
    assert found.metadata == metadata
    assert found.tokenizer is not None and found.tokenizer.encode("ü") == [0xC3, 0xBC]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config.to_dict()
    assert json.loads((tmp_path / "run" / "fastlm.json").read_text())["step"] == 7
    assert load_run(tmp_path / "run", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_precision_is_kept(tmp_path: Path) -> None:
    model = build(CONFIGS[1]).to(torch.bfloat16)
    save_run(model, tmp_path)
    found = load_run(tmp_path)
    assert same_weights(found.model, model) and found.model.dtype == torch.bfloat16
    assert found.tokenizer is None and found.metadata == {}


def test_saving_again_replaces_only_its_own(tmp_path: Path) -> None:
    save_run(build(CONFIGS[0]), tmp_path, Tokenizer.byte(), {"step": 1})
    (tmp_path / "log.jsonl").write_text("{}\n")
    second = build(CONFIGS[2])
    save_run(second, tmp_path, metadata={"step": 2})
    found = load_run(tmp_path)
    assert same_weights(found.model, second) and found.metadata == {"step": 2} and found.tokenizer is None
    names = {"config.json", "fastlm.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "log.jsonl"}
    assert set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_save_that_fails_at_any_file_leaves_the_old_run(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(CONFIGS[0])
    save_run(old, tmp_path, Tokenizer.byte(), {"step": 1})
    calls = 0

    def replace(source: Any, target: Any, original: Any = os.replace) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match="No space left on device; the previous file is unchanged"):
        save_run(build(CONFIGS[2]), tmp_path, Tokenizer.character(["abc"]), {"step": 2})
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    found = load_run(tmp_path)
    assert same_weights(found.model, old) and found.metadata == {"step": 1}
    assert found.tokenizer is not None and found.tokenizer.kind == "byte"


def test_kill_while_saving(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from fastlm.checkpoints import save_run\n"
        "from fastlm.models import GPTConfig, build\n"
        "from fastlm.data.tokenizer import Tokenizer\n"
        "model = build(GPTConfig(vocab_size=257, context_length=64, num_layers=2, num_heads=2, hidden_size=128))\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    for parameter in model.parameters():\n"
        "        torch.nn.init.constant_(parameter, float(step))\n"
        "    save_run(model, sys.argv[1], Tokenizer.byte(), {'step': step})\n"
    )
    weights = tmp_path / "model.safetensors"
    for extra in (0.004, 0.023):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        before = weights.stat().st_ino if weights.exists() else None
        deadline = time.monotonic() + 90
        while not weights.exists() or weights.stat().st_ino == before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        time.sleep(extra)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = load_run(tmp_path)
        for parameter in found.model.parameters():
            assert bool((parameter == found.metadata["step"]).all())


def test_damaged_runs(tmp_path: Path) -> None:
    save_run(build(CONFIGS[0]), tmp_path, Tokenizer.byte())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()

    def expect(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_run(tmp_path)

    for cut in (0, 7, 200, len(content) - 1):
        weights.write_bytes(content[:cut])
        expect(r"model\.safetensors: is no sound safetensors file")
    weights.unlink()
    expect(r"model\.safetensors: is no sound safetensors file")
    weights.write_bytes(content)
    tensors = load_file(weights)
    good = {"config": json.dumps(CONFIGS[0].to_dict()), "tokenizer": "{}", "fastlm": json.dumps({"format": 1})}
    for header, message in (
        (None, "was not written by fastlm"),
        ({**good, "config": "{"}, "was not written by fastlm"),
        ({**good, "fastlm": "[]"}, "was not written by fastlm"),
        ({**good, "fastlm": '{"format": 99}'}, "has format 99, this version of fastlm reads 1"),
        ({**good, "config": "[]"}, r"has the configuration \[\]"),
        ({**good, "tokenizer": '{"../x": ""}'}, r"has a tokenizer file '\.\./x', expected a plain name"),
        ({**good, "tokenizer": '{"tokenizer.json": "{"}'}, "tokenizer: "),
        ({**good, "config": '{"architecture": "gpt9"}'}, "describes no model: architecture: 'gpt9'"),
        ({**good, "config": json.dumps({**CONFIGS[0].to_dict(), "num_layers": 2})}, r"lacks layers\.1\."),
        (
            {**good, "config": json.dumps({**CONFIGS[0].to_dict(), "vocab_size": 9})},
            r"is \[257, 16\], expected \[9, 16\]",
        ),
    ):
        save_file(tensors, weights, header)
        expect(message)
    save_file(tensors, weights, good)
    load_run(tmp_path)
