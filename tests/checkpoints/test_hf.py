"""Hugging Face folders: what transformers saved is what we compute, what we save is what transformers computes."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import VOCAB, gpt2, llama, qwen2, randomized, write
from logits import mean_kl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from fastlm import checkpoints
from fastlm.checkpoints import CheckpointError, load_gguf, load_hf, save_hf
from fastlm.data.tokenizer import Tokenizer
from fastlm.models import GPT, GPTConfig, Llama, LlamaConfig, RecurrentConfig, build
from fastlm.nn.linear import QuantizedLinear


def mistral(**options: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 9,
    }
    return randomized(MistralForCausalLM(MistralConfig(**{**sizes, **options})))


PEERS: dict[str, Any] = {
    "gpt2": lambda: gpt2(),
    "gpt2-inner": lambda: gpt2(n_inner=80, layer_norm_epsilon=1e-3),
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False),
    "llama": lambda: llama(),
    "llama-tied-biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: llama(head_dim=32, num_key_value_heads=None),
    "llama3": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "qwen2": lambda: qwen2(),
    "mistral-window": lambda: mistral(),
}


@torch.no_grad()
def expect_same(ours: Any, theirs: Any, bound: float = 1e-5) -> None:
    tokens = torch.randint(VOCAB, (2, 30))
    expected, found = theirs(tokens).logits, ours(tokens)
    assert mean_kl(expected, found) < bound
    if bound <= 1e-5:
        assert torch.equal(expected.argmax(-1), found.argmax(-1))


@pytest.mark.parametrize("name", PEERS)
def test_loads_what_transformers_saved(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    peer.save_pretrained(tmp_path)
    found = checkpoints.load(tmp_path)
    expect_same(found.model, peer)
    assert found.metadata["model_type"] == peer.config.model_type
    assert found.tokenizer is None
    model = found.model
    state, tokens = model.make_state(1), torch.randint(VOCAB, (1, 24))
    with torch.no_grad():
        steps = torch.cat([model(tokens[:, t : t + 1], state) for t in range(24)], 1)
        assert mean_kl(peer(tokens).logits, steps) < 1e-5


@pytest.mark.parametrize("name", PEERS)
def test_transformers_loads_what_we_save(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    peer.save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs", dtype=torch.float32).model
    save_hf(model, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.model_type == peer.config.model_type
    theirs, ours = peer.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    expect_same(model, again.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_half_precision_stays_and_computes_in_float32(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    peer = make().to(dtype)
    peer.save_pretrained(tmp_path)
    model = load_hf(tmp_path, compute="exact").model
    assert isinstance(model.get_submodule("layers.0.attention.output"), QuantizedLinear)
    assert model(torch.zeros(1, 1, dtype=torch.int64)).dtype == torch.float32
    expect_same(model, peer.float())
    expect_same(load_hf(tmp_path, dtype=torch.float32).model, peer)
    assert {p.dtype for p in load_hf(tmp_path, dtype=dtype).model.parameters()} == {dtype}


def test_shards(tmp_path: Path) -> None:
    peer = llama()
    peer.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expect_same(load_hf(tmp_path).model, peer)


def test_quantised_model_saved_for_transformers(tmp_path: Path) -> None:
    model = load_gguf(write(tmp_path / "m.gguf", peer := llama(), "Q4_1"), compute="exact").model
    save_hf(model, tmp_path / "hf")
    expect_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())
    expect_same(load_hf(tmp_path / "hf").model, peer)


def test_bare_model_and_old_buffers(tmp_path: Path) -> None:
    peer = gpt2()
    peer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, path)
    expect_same(load_hf(tmp_path).model, peer)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = Tokenizer.byte()
    model = build(
        GPTConfig(vocab_size=tokenizer.vocab_size, context_length=8, num_layers=1, num_heads=2, hidden_size=16)
    )
    save_hf(model, tmp_path, tokenizer)
    found = load_hf(tmp_path)
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: tokenizer: "):
        load_hf(tmp_path)


def test_what_transformers_can_not_express(tmp_path: Path) -> None:
    sizes = {"vocab_size": 9, "num_layers": 1, "num_heads": 2, "hidden_size": 16}
    for model, message in (
        (build(RecurrentConfig(vocab_size=9, embedding_size=8, hidden_size=8)), "is a LSTMLM, expected GPT or Llama"),
        (GPT(GPTConfig(**sizes, bias=False)), "bias is False"),
        (Llama(LlamaConfig(**sizes, intermediate_size=8, output_bias=True)), "output_bias=True"),
        (Llama(LlamaConfig(**sizes, intermediate_size=8, rope_dim=4)), "rope_dim=4"),
        (
            Llama(
                LlamaConfig(**sizes, intermediate_size=8, rope_scaling={"rope_type": "divisors", "divisors": [1] * 4})
            ),
            "rope_scaling",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*refused"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no sound safetensors file"):
        load_hf(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".safetensors", "w.bin", "a\\b.safetensors"],
)
def test_index_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(
        CheckpointError, match=r"index\.json: weight_map leads to .*expected a \.safetensors file beside"
    ):
        load_hf(folder)


def test_damaged_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    weights, config, index = (
        tmp_path / n for n in ("model.safetensors", "config.json", "model.safetensors.index.json")
    )
    content = weights.read_bytes()
    for cut in (0, 4, 9, 500, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is no sound safetensors file"):
            load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_hf(tmp_path)
    for text, message in (
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: is no sound"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_hf(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "part.safetensors")
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"weight_map names 'a', but part\.safetensors does not hold it"):
        load_hf(tmp_path)
    for text in ("", "{", "\x00", "[" * 100_000):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
            load_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"config\.json: model_type is 'bert', expected one of gpt2, llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, r"config\.json: hidden_act is 'gelu', supported are 'silu'"),
        ({"hidden_size": "64"}, r"config\.json: hidden_size is '64', expected int"),
        ({"num_hidden_layers": None}, r"config\.json: num_hidden_layers is None, expected int"),
        ({"num_key_value_heads": 3}, r"config\.json: describes no model: .*num_heads 4"),
        ({"num_hidden_layers": 3}, r"model\.safetensors: .*lacks model\.layers\.2\..* and 4 more"),
        ({"num_hidden_layers": 1}, r"model\.safetensors: .*unexpected model\.layers\.1\."),
        ({"intermediate_size": 90}, r"mlp\.down_proj\.weight is \[64, 96\], expected \[64, 90\]"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"config\.json: describes no model: .*'yarn'"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_hf(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        load_hf(tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no fastlm\.json, no config\.json, and 0 \.gguf files"):
        checkpoints.load(tmp_path)
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(CheckpointError, match="only the weights; give the folder"):
        checkpoints.load(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="compute: 'slow', expected 'fast' or 'exact'"):
        checkpoints.load(tmp_path, compute="slow")
    with pytest.raises(ValueError, match=r"dtype: torch\.int8, expected a floating dtype"):
        checkpoints.load(tmp_path, dtype=torch.int8)
