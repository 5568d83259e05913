"""Random models of a few thousand weights, whose logits are spread enough for tokens to vary and to be clear."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastlm.models.base import CausalLM
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.llama import Llama, LlamaConfig
from fastlm.models.recurrent import LSTMLM, RNNLM, RecurrentConfig

__all__ = ["TINY", "VOCAB", "gpt", "llama", "lstm", "spread"]

VOCAB = 97


def gpt() -> CausalLM:
    return GPT(GPTConfig(vocab_size=VOCAB, context_length=64, num_layers=2, num_heads=4, hidden_size=32))


def llama(**options: object) -> CausalLM:
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    return Llama(LlamaConfig(vocab_size=VOCAB, context_length=64, **{**sizes, **options}))


def lstm() -> CausalLM:
    return LSTMLM(RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=32, num_layers=2))


def gru() -> CausalLM:
    return RNNLM(RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=24, num_layers=2, cell="gru"))


TINY: dict[str, Callable[[], CausalLM]] = {
    "gpt": gpt,
    "llama": llama,
    "llama-window-interleaved": lambda: llama(window=6, rope_interleaved=True, qkv_bias=True, tie_embeddings=True),
    "lstm": lstm,
    "gru": gru,
}


def spread(make: Callable[[], CausalLM]) -> CausalLM:
    """The model, always the same one, with matrices four times as large as initialised."""
    torch.manual_seed(5)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model
