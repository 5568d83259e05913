"""What is Llama's own: the two orders of rotary rows, scaling, windows; and the real model against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logits import mean_kl
from torch import Tensor

from fastlm.checkpoints import load_gguf
from fastlm.checkpoints.weights import skeleton
from fastlm.models import Llama, LlamaConfig
from fastlm.models.llama import make_rotary

CONFIG = LlamaConfig(
    vocab_size=60,
    context_length=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    hidden_size=32,
    intermediate_size=48,
    qkv_bias=True,
)


def shaken(config: LlamaConfig) -> Llama:
    model = Llama(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_number_of_parameters_is_llama_2s() -> None:
    assert sum(p.numel() for p in skeleton(Path(), LlamaConfig).parameters()) == 6_738_415_616


@torch.no_grad()
def test_interleaved_rows_are_the_halves_reordered() -> None:
    halves = shaken(CONFIG)
    adjacent = Llama(replace(CONFIG, rope_interleaved=True)).eval()
    weights = halves.state_dict()
    for name, weight in weights.items():
        if ".query." in name or ".key." in name:
            weights[name] = weight.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
    adjacent.load_state_dict(weights)
    ids = torch.randint(60, (2, 40))
    assert torch.allclose(halves(ids), adjacent(ids), atol=1e-4)
    adjacent.load_state_dict(halves.state_dict())
    assert not torch.allclose(halves(ids), adjacent(ids), atol=1e-1)


def test_rotary_stays_exact_in_low_precision() -> None:
    # Rounded to bfloat16, angles at position 60 would be off by whole tenths of radians.
    exact = make_rotary(CONFIG).tables(torch.arange(64))[0]
    assert torch.equal(Llama(CONFIG).to(torch.bfloat16).rotary.tables(torch.arange(64))[0], exact)


def test_divisors_slow_each_pair() -> None:
    plain = make_rotary(CONFIG).frequencies
    divided = make_rotary(replace(CONFIG, rope_scaling={"rope_type": "divisors", "divisors": [1, 2, 4.0, 8]}))
    assert torch.equal(divided.frequencies, plain / torch.tensor([1, 2, 4, 8]))
    with pytest.raises(ValueError, match="3 divisors for 4 frequencies"):
        make_rotary(replace(CONFIG, rope_scaling={"rope_type": "divisors", "divisors": [1, 2, 3]}))


@torch.no_grad()
def test_window_forgets_what_lies_before_it() -> None:
    # Two layers of a window of 4 see 2 * 3 tokens back.
    model = shaken(replace(CONFIG, window=4))
    ids = torch.randint(60, (1, 20))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 60
    differs = (model(ids) != model(changed)).any(-1)[0]
    assert differs[10:17].all() and not differs[:10].any() and not differs[17:].any()


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 2, 3, 5, 8, 13,",
    "<|im_start|>user\nWhat is photosynthesis?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def peer(smollm2_gguf: Path) -> Any:
    """transformers' model, its weights dequantised by transformers' own reader, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


def real_text() -> str:
    import pydoc_data.topics

    return pydoc_data.topics.topics["typesmodules"] + pydoc_data.topics.topics["specialnames"]


@torch.no_grad()
def by_steps(model: Any, ids: Tensor, prompt: int) -> Tensor:
    state = model.make_state(1, ids.shape[1])
    parts = [model(ids[:, :prompt], state)]
    parts += [model(ids[:, t : t + 1], state) for t in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.model
@torch.no_grad()
def test_real_model_exact(smollm2_gguf: Path, peer: Any) -> None:
    found = load_gguf(smollm2_gguf, compute="exact")
    assert found.tokenizer is not None
    for prompt in PROMPTS:
        ids = torch.tensor([found.tokenizer.encode(prompt, parse_special=True)])
        state, logits, given = found.model.make_state(1, 100), [], ids.shape[1]
        logits.append(found.model(ids, state))
        for _ in range(32):
            ids = torch.cat([ids, logits[-1][:, -1:].argmax(-1)], 1)
            logits.append(found.model(ids[:, -1:], state))
        ours, theirs = torch.cat(logits, 1), peer(ids).logits
        assert mean_kl(theirs, ours) < 1e-5
        assert mean_kl(theirs, found.model(ids)) < 1e-5
        # Read at once, transformers' model would have chosen the same tokens one by one.
        assert torch.equal(theirs[:, given - 1 : -1].argmax(-1), ids[:, given:])


@pytest.mark.model
@torch.no_grad()
def test_real_model_fast(smollm2_gguf: Path, peer: Any) -> None:
    found = load_gguf(smollm2_gguf, compute="fast")
    assert found.tokenizer is not None
    ids = torch.tensor([found.tokenizer.encode(real_text())[:512]])
    assert ids.shape == (1, 512)
    expected = peer(ids).logits
    decode = mean_kl(expected[:, 8:], by_steps(found.model, ids, 8)[:, 8:])
    prefill = mean_kl(expected, found.model(ids))
    print(f"mean KL over 512 tokens: decode {decode:.2e}, prefill {prefill:.2e}")
    # llama.cpp's own, on 512 tokens at Q4_1, measured.
    assert decode < 3.3e-3 and prefill < 3.3e-3
