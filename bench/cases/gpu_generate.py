"""Decoding on a GPU, batch 1 and 8: the step as a CUDA graph against the same step op by op, and transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import models
from bench.case import Case, require
from bench.gpu import live
from fastlm.generation import Decoder, SamplingParams
from fastlm.models.base import CausalLM
from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["cases"]

_TOKENS = 128


def _smollm2(device: str) -> CausalLM:
    import fastlm

    return fastlm.load(models.smollm2("F16"), dtype=torch.bfloat16, device=device).model


def _gpt2(device: str) -> CausalLM:
    torch.manual_seed(0)  # GPT-2's shape; which weights it has does not matter to its speed
    return GPT(GPTConfig()).to(device, torch.bfloat16).eval()


def _tiny(device: str) -> CausalLM:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=61, context_length=48, num_layers=1, num_heads=2, hidden_size=16)
    return GPT(config).to(device).eval()


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """SmolLM2-135M and GPT-2 124M in bfloat16, greedy."""
    makers: dict[str, Callable[[str], CausalLM]] = {"SmolLM2-135M": _smollm2, "GPT-2 124M": _gpt2}
    for name, make in {"tiny": _tiny}.items() if small else makers.items():
        model = functools.cache(functools.partial(make, device))
        for batch in (1, 8):
            for peer in ("op by op", "transformers"):
                if peer != "transformers" or name == "SmolLM2-135M":
                    yield _case(name, model, batch, peer, 12 if small else _TOKENS, device)


def generate(model: CausalLM, prompts: list[list[int]], count: int, capture: bool) -> tuple[list[list[int]], Decoder]:
    """Greedy tokens of each prompt."""
    decoder = Decoder(model, prompts, SamplingParams(max_new_tokens=count, temperature=0), capture=capture)
    found: list[list[int]] = [[] for _ in prompts]
    while decoder.active:
        for token in decoder.step(16):
            found[token.row].append(token.id)
    return found, decoder


@functools.cache
def _transformers(device: str) -> Any:
    from transformers import AutoModelForCausalLM

    file = models.smollm2("F16")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    return loaded.to(device).eval()


def _case(name: str, model: Callable[[], CausalLM], batch: int, peer: str, count: int, device: str) -> Case:
    prompts = [[(7 * row + 3 * at + 1) % 50 for at in range(16)] for row in range(batch)]

    def gate() -> str:
        plain, _ = generate(model(), prompts, count, False)
        got, decoder = generate(model(), prompts, count, True)
        require(device == "cpu" or decoder.why_not_captured is None, f"not captured: {decoder.why_not_captured}")
        require(got == plain, "the captured step's tokens are not those of the step run op by op")
        return "captured, and the very tokens of the step run op by op"

    def theirs() -> object:
        if peer == "op by op":
            return generate(model(), prompts, count, False)
        ids = torch.tensor(prompts, device=device)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return _transformers(device).generate(ids, attention_mask=torch.ones_like(ids), **options)

    return Case(
        name=f"decode {name}, bf16",
        shape=f"batch {batch}, {count} tokens",
        peer_name="ours op by op" if peer == "op by op" else peer,
        gate=gate,
        ours=lambda: generate(model(), prompts, count, True),
        peer=live.peer(peer, theirs),
        work=count * batch,
        unit="tokens",
        seconds=0,
        pairs=5,
        device=device,
    )
