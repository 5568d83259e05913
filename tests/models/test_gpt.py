"""What is GPT-2's own. That its logits are GPT-2's is tested with the checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.checkpoints.weights import skeleton
from fastlm.models import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=500, context_length=64, num_layers=8, num_heads=4, hidden_size=128)


def test_number_of_parameters_is_gpt2s() -> None:
    assert sum(p.numel() for p in skeleton(Path(), GPTConfig).parameters()) == 124_439_808


def test_initialisation() -> None:
    model = GPT(CONFIG)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(16) if residual else 0.02
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name
    # So a fresh model knows nothing: its loss is that of a uniform guess.
    ids = torch.randint(500, (2, 64))
    assert float(model.loss(ids, ids.roll(1)).detach()) == pytest.approx(math.log(500), abs=0.1)


def test_dropout_in_training_alone() -> None:
    model = GPT(replace(CONFIG, dropout=0.5))
    ids = torch.randint(500, (2, 16))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    plain = GPT(CONFIG)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids), model(ids))


def test_tied_embedding_is_one_parameter() -> None:
    tied = GPT(CONFIG)
    untied = GPT(replace(CONFIG, tie_embeddings=False))
    extra = {name for name, _ in untied.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert extra == {"output.weight"}
