"""What must hold for every family: state equals no state, rows don't see each other, loss, errors, configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.models import (
    GPT,
    LSTMLM,
    RNNLM,
    CausalLM,
    GPTConfig,
    Llama,
    LlamaConfig,
    RecurrentConfig,
    build,
    config_from_dict,
)
from fastlm.models.base import ModelConfig

VOCAB = 97
SIZES = {"vocab_size": VOCAB, "context_length": 32, "num_layers": 3, "num_heads": 6, "hidden_size": 48}
CONFIGS: dict[str, ModelConfig] = {
    "gpt": GPTConfig(**SIZES),
    "gpt-untied-no-bias": GPTConfig(**SIZES, bias=False, tie_embeddings=False, intermediate_size=56),
    "gpt-rotary-qk-norm": GPTConfig(**SIZES, bias=False, tie_embeddings=False, rope_theta=1000.0, qk_norm=True),
    "llama": LlamaConfig(**SIZES, intermediate_size=80),
    "llama-gqa-tied": LlamaConfig(
        **SIZES, intermediate_size=80, num_kv_heads=2, head_dim=16, tie_embeddings=True, rope_interleaved=True
    ),
    "llama-biases-window": LlamaConfig(
        **SIZES, intermediate_size=80, qkv_bias=True, output_bias=True, mlp_bias=True, window=5, rope_dim=4
    ),
    "lstm": RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=40, num_layers=2),
    "lstm-untied": RecurrentConfig(
        vocab_size=VOCAB, embedding_size=24, hidden_size=33, num_layers=1, tie_embeddings=False
    ),
    "gru": RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=40, num_layers=2, cell="gru"),
    "tanh": RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=40, num_layers=2, cell="tanh"),
    "relu": RecurrentConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=40, num_layers=2, cell="relu"),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    model = build(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, attention is nearly uniform and biases vanish: faults would not show.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@torch.no_grad()
def test_token_by_token_equals_all_at_once(model: CausalLM) -> None:
    tokens = ids(3, 20)
    full = model(tokens)
    assert full.shape == (3, 20, VOCAB)
    state = model.make_state(3)
    steps = [model(tokens[:, t : t + 1], state) for t in range(20)]
    close(torch.cat(steps, 1), full)
    assert state.lengths.tolist() == [20, 20, 20]


@torch.no_grad()
def test_chunks_then_steps_equal_all_at_once(model: CausalLM) -> None:
    tokens = ids(2, 21)
    state = model.make_state(2)
    parts = [model(tokens[:, a:b], state) for a, b in ((0, 7), (7, 8), (8, 19), (19, 21))]
    close(torch.cat(parts, 1), model(tokens))


@torch.no_grad()
def test_ragged_rows_each_follow_their_own_prompt(model: CausalLM) -> None:
    lengths = [9, 1, 14]
    tokens = ids(3, 25)
    state = model.make_state(3)
    for row, length in enumerate(lengths):
        model(tokens[row : row + 1, :length], state.row(row))
    assert state.lengths.tolist() == lengths
    full = model(tokens)

    def following(rows: list[int], count: int) -> Tensor:
        at = torch.stack([torch.arange(count) + lengths[row] for row in rows])
        for row in rows:
            lengths[row] += count
        return at

    for rows, count in (([0, 1, 2], 1), ([2, 0], 1), ([1], 1), ([1, 2], 3), ([0, 1, 2], 2), ([2, 1, 0], 1)):
        at = following(rows, count)
        index = torch.tensor(rows)
        chosen = rows if rows != [0, 1, 2] else None
        close(model(tokens[index[:, None], at], state, chosen), full[index[:, None], at])
    assert state.lengths.tolist() == lengths


# The cells of GRU and RNN are torch's own, whose matrix products round by the size of the batch.
@pytest.mark.parametrize("model", [n for n in CONFIGS if n not in ("gru", "tanh", "relu")], indirect=True)
@pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")
@torch.no_grad()
def test_the_batch_does_not_change_a_row(model: CausalLM) -> None:
    rows = 19
    tokens = ids(rows, 28)
    alone, together = model.make_state(rows), model.make_state(rows)
    for row in range(rows):
        model(tokens[row : row + 1, : 4 + row], alone.row(row))
        model(tokens[row : row + 1, : 4 + row], together.row(row))
    order = torch.randperm(rows).tolist()
    for step in range(3):
        chosen = order if step else None
        at = order if step else list(range(rows))
        next_ids = torch.stack([tokens[row, 4 + row + step : 5 + row + step] for row in at])
        batch = model(next_ids, together, chosen)
        for entry, row in enumerate(at):
            assert torch.equal(model(next_ids[entry : entry + 1], alone.row(row)), batch[entry : entry + 1])


@torch.no_grad()
def test_reset_forgets(model: CausalLM) -> None:
    state = model.make_state(2)
    tokens = ids(2, 6)
    model(ids(2, 9), state)
    state.reset([1])
    assert state.lengths.tolist() == [9, 0]
    close(model(tokens[1:], state, [1]), model(tokens[1:]))
    state.reset()
    close(model(tokens, state), model(tokens))


def test_loss_is_the_cross_entropy_of_the_logits(model: CausalLM) -> None:
    tokens, targets = ids(2, 15), ids(2, 15)
    targets[0, :4] = -100
    loss = model.loss(tokens, targets)
    close(loss, functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match=r"loss: targets is \[2, 14\], expected \[2, 15\]"):
        model.loss(tokens, targets[:, 1:])


@pytest.mark.parametrize("name", ["gpt", "llama-biases-window"])
def test_recomputing_changes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    if isinstance(config, GPTConfig):
        config = dataclasses.replace(config, dropout=0.3)
    model, tokens, runs = build(config).train(), ids(2, 9), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    grads, counts = [], []
    for recompute in (False, True):
        model.recompute = recompute
        runs.clear()
        torch.manual_seed(3)
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        counts.append(len(runs))
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert counts == [3, 6]
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-8)
    model.eval()
    runs.clear()
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert len(runs) == 3


def test_training_lowers_the_loss(model: CausalLM) -> None:
    tokens = ids(2, 16)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1, VOCAB]]), f"input_ids: id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (torch.tensor([[-1, 3]]), f"input_ids: id -1 is outside the vocabulary of {VOCAB}"),
        (torch.tensor([1, 2]), r"input_ids: int64 \[2\] on cpu, expected int64 or int32 \[B, T\]"),
        (torch.ones(1, 2), r"input_ids: float32 \[1, 2\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"input_ids: int64 \[1, 0\].*at least one token"),
    ],
)
def test_bad_ids(model: CausalLM, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(bad)


def test_bad_rows(model: CausalLM) -> None:
    state = model.make_state(3)
    for rows in ([0, 0], [3, 1], [-1, 0], [0, 1, 2], [1]):
        with pytest.raises(ValueError, match="rows"):
            model(ids(2, 1), state, rows)
    with pytest.raises(ValueError, match="rows"):
        model(ids(2, 1), state)
    with pytest.raises(ValueError, match="row: 3, expected 0 to 2"):
        state.row(3)
    with pytest.raises(ValueError, match="rows=0"):
        model.make_state(0)
    assert state.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_context_is_limited(name: str) -> None:
    model = build(CONFIGS[name]).eval()
    with pytest.raises(ValueError, match="input_ids: 33 tokens exceed the model's context length of 32"):
        model(ids(1, 33))
    state = model.make_state(2, 10)
    model(ids(1, 8), state.row(1))
    with pytest.raises(ValueError, match="row 1 holds 8 tokens; 3 more exceed its max_length of 10"):
        model(ids(2, 3), state)
    assert state.lengths.tolist() == [0, 8]
    with pytest.raises(ValueError, match="max_length: 33 exceeds the model's context length of 32"):
        model.make_state(1, 33)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_round_trip(name: str) -> None:
    config = CONFIGS[name]
    assert config_from_dict(config.to_dict()) == config
    first, second = build(config.to_dict()), build(config)
    second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "gpt3"}, "architecture: 'gpt3' is not one of gpt, llama, recurrent"),
        ({}, "architecture: None is not one of"),
        ({"architecture": "gpt", "n_layer": 3}, r"unknown keys \['n_layer'\]"),
        ({"architecture": "recurrent"}, r"missing keys \['vocab_size'\]"),
        ({"architecture": "gpt", "num_layers": 0}, "num_layers is 0, expected a positive integer"),
        ({"architecture": "gpt", "hidden_size": 50}, "hidden_size 50 is not a multiple of num_heads 12"),
        ({"architecture": "gpt", "dropout": 1.0}, "dropout is 1.0, expected 0 <= p < 1"),
        ({"architecture": "llama", "num_kv_heads": 3}, "num_heads 32 is not a multiple of num_kv_heads 3"),
        ({"architecture": "llama", "num_heads": 4, "rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"architecture": "recurrent", "vocab_size": 9, "cell": "sru"}, "cell is 'sru', expected one of lstm"),
    ],
)
def test_bad_configurations(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"num_layers": 1, "hidden_size": 96, **values})


def test_families_by_configuration() -> None:
    kinds = {"gpt": GPT, "llama": Llama, "lstm": LSTMLM, "gru": RNNLM}
    for name, kind in kinds.items():
        assert type(build(CONFIGS[name])) is kind
    with pytest.raises(ValueError, match="LSTMLM: cell is 'gru'"):
        LSTMLM(CONFIGS["gru"])  # type: ignore[arg-type]
