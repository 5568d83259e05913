"""Greedy decoding of a real model, against transformers in float32 on the same dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastlm
from bench.case import Case, require
from fastlm.checkpoints.pull import pull
from fastlm.models.llama import LlamaConfig

__all__ = ["cases", "transformers_llama"]

_PROMPT = "The history of the steam engine begins"
_TOKENS = 64


def transformers_llama(path: str) -> Any:
    """transformers' LlamaForCausalLM in float32 with the weights of a Llama GGUF file, dequantised by transformers."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    file = Path(path)
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


def cases() -> Iterator[Case]:
    """SmolLM2-135M, Q4_1 file, batch 1."""
    path = str(pull("smollm2-135m"))
    peer = transformers_llama(path)
    model = fastlm.load(path, compute="fast")
    exact = fastlm.load(path, compute="exact")
    assert isinstance(model.model.config, LlamaConfig)
    ids = model.encode(_PROMPT)
    inputs = torch.tensor([ids])

    def run_peer() -> list[int]:
        with torch.inference_mode():
            out = peer.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=_TOKENS,
                min_new_tokens=_TOKENS,
                do_sample=False,
            )
        return out[0, len(ids) :].tolist()

    def run_ours(lm: fastlm.LanguageModel = model) -> list[int]:
        return lm.generate_ids([ids], max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, temperature=0)[0]

    def gate() -> None:
        require(run_ours(exact) == run_peer(), "greedy tokens (exact) differ from transformers'")
        with torch.inference_mode():
            want = peer(inputs).logits[0].double().log_softmax(-1)
        got = model.logits(inputs)[0].double().log_softmax(-1)
        divergence = float((want.exp() * (want - got)).sum(-1).mean())
        require(divergence < 3.3e-3, f"mean KL of the fast path is {divergence:.2e}")

    yield Case(
        name="decode SmolLM2-135M Q4_1",
        shape=f"batch 1, {_TOKENS} tokens",
        peer_name="transformers float32",
        gate=gate,
        ours=run_ours,
        peer=run_peer,
        work=_TOKENS,
        unit="tokens",
        goal=5.0,
        pairs=5,
    )
