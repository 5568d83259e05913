"""Small runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models import build
from fastlm.models.base import CausalLM
from fastlm.training import Trainer, TrainingConfig, read_log

VOCABULARY = 8


def transition(seed: int = 3) -> Tensor:
    """A Markov chain's probabilities [from, to], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64), dim=1)


def entropy_rate(p: Tensor) -> float:
    """Nats per token of the chain in its stationary distribution: what no model can beat."""
    stationary = torch.linalg.matrix_power(p, 1000)[0]
    return float(-(stationary[:, None] * p * p.log()).sum())


def markov_text(length: int, seed: int = 0) -> Tensor:
    """`length` tokens of the chain, int64."""
    cumulative = transition().cumsum(dim=1).tolist()
    uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed)).tolist()
    state, text = 0, []
    for u in uniform:
        state = next((i for i, c in enumerate(cumulative[state]) if u < c), VOCABULARY - 1)
        text.append(state)
    return torch.tensor(text)


def tiny_model(kind: str, *, dropout: float = 0.1, seed: int = 5) -> CausalLM:
    """A GPT ("gpt") or a recurrent model ("lstm", "gru", "tanh") for `markov_text`."""
    torch.manual_seed(seed)
    if kind == "gpt":
        sizes: dict[str, Any] = {"context_length": 16, "num_layers": 1, "num_heads": 2, "hidden_size": 32}
        return build({"architecture": "gpt", "vocab_size": VOCABULARY, "dropout": dropout, **sizes})
    sizes = {"cell": kind, "embedding_size": 16, "hidden_size": 24, "num_layers": 2}
    return build({"architecture": "recurrent", "vocab_size": VOCABULARY, "hidden_dropout": dropout, **sizes})


def tiny_trainer(
    kind: str, folder: Path | None = None, *callbacks: Any, dropout: float = 0.1, **config: Any
) -> Trainer:
    """A trainer of `tiny_model`: 20 steps, evaluations and checkpoints every 5."""
    fields = {
        "max_steps": 20,
        "warmup_steps": 4,
        "batch_size": 4,
        "block_length": 16,
        "eval_interval": 5,
        "eval_batches": 2,
        "learning_rate": 3e-3,
        **config,
    }
    text = markov_text(1400)
    return Trainer(
        tiny_model(kind, dropout=dropout), text[:1200], text[1200:], TrainingConfig(**fields), folder, callbacks
    )


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """The log's numbers that must not depend on interruptions."""
    return [
        (r["step"], r["loss"], r["lr"], r["grad_norm"]) if "loss" in r else (r["step"], r["valid_loss"], r["best"])
        for r in read_log(folder / "log.jsonl")
    ]
