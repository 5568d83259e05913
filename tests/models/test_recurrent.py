"""What is the recurrent models' own: torch's numbers, carried state, and the dropouts of AWD-LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlm.models import RNNLM, RecurrentConfig, build
from fastlm.models import recurrent as module
from fastlm.models.recurrent import CELLS, locked_dropout

CONFIG = RecurrentConfig(vocab_size=80, embedding_size=24, hidden_size=36, num_layers=2)


def ids(*shape: int) -> Tensor:
    return torch.randint(80, shape)


def lstm_lm(**changes: Any) -> RNNLM:
    model = build(replace(CONFIG, **changes))
    assert isinstance(model, RNNLM)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torchs_modules(cell: str, tied: bool) -> None:
    model = lstm_lm(cell=cell, tie_embeddings=tied).eval()
    sizes = [24, 36, 24 if tied else 36]
    tokens = ids(3, 17)
    x = model.embedding(tokens)
    for index, layer in enumerate(model.layers):
        make: Callable[..., nn.RNNBase] = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)
        options = {} if cell in ("lstm", "gru") else {"nonlinearity": cell}
        peer = make(sizes[index], sizes[index + 1], batch_first=True, **options)
        peer.load_state_dict(layer.state_dict())
        x = peer(x)[0]
    weight = model.embedding.weight if tied else model.output.weight
    assert torch.allclose(model(tokens), x @ weight.T + model.head_bias, atol=1e-5)


def test_truncated_backpropagation_carries_the_state() -> None:
    model = lstm_lm()
    tokens, targets = ids(2, 24), ids(2, 24)
    state = model.make_state(2)
    losses = [model.loss(tokens[:, a : a + 8], targets[:, a : a + 8], state) for a in (0, 8, 16)]
    assert state.lengths.tolist() == [24, 24] and not state.h[0].requires_grad
    # The segments together predict what the whole does,
    assert torch.allclose(torch.stack(losses).mean(), model.loss(tokens, targets), atol=1e-6)
    # and the last one's gradient is that of a model that begins with the state as a constant.
    losses[2].backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    constant = model.make_state(2)
    with torch.no_grad():
        model(tokens[:, :16], constant)
    model.loss(tokens[:, 16:], targets[:, 16:], constant).backward()
    for grad, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None and torch.allclose(grad, parameter.grad, atol=1e-7)
    fresh = model.loss(tokens[:, 16:], targets[:, 16:])
    assert not torch.allclose(losses[2], fresh, atol=1e-4)


def test_locked_dropout_keeps_its_mask_over_time() -> None:
    x = torch.ones(50, 4, 300)
    y = locked_dropout(x, 0.3, True)
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.equal(y[0, 0], y[0, 1])
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.05)
    assert locked_dropout(x, 0.3, False) is x


def test_embedding_dropout_drops_words() -> None:
    model = lstm_lm(embedding_dropout=0.5).train()
    tokens = ids(40, 3)
    x = model._embed(tokens)
    plain = model.embedding(tokens)
    kept = (x != 0).any(-1)
    # A word is dropped everywhere or nowhere, and the rest scaled so that the mean stays.
    for word in tokens.unique():
        assert kept[tokens == word].unique().numel() == 1
    assert 0 < kept.sum() < kept.numel()
    assert torch.allclose(x[kept], plain[kept] / 0.5)


@pytest.mark.parametrize("count", [1, 5])
def test_weight_dropout_drops_hidden_weights_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lstm_lm(weight_dropout=0.5)
    seen: list[list[Tensor]] = []
    name = "lstm_cell" if count == 1 else "lstm"
    original = getattr(module.ops, name)

    def watched(x: Tensor, state: Any, *weights: Any) -> Any:
        seen.append(list(weights) if count == 1 else list(weights[0]))
        return original(x, state, *weights)

    monkeypatch.setattr(module.ops, name, watched)
    model.train()(ids(2, count))
    for layer, weights in zip(model.layers, seen, strict=True):
        kept = weights[1] != 0
        assert 0.35 < float(kept.float().mean()) < 0.65
        assert torch.allclose(weights[1][kept], layer.weight_hh_l0[kept] * 2)
        assert weights[0] is layer.weight_ih_l0 and weights[2] is layer.bias_ih_l0
    seen.clear()
    model.eval()(ids(2, count))
    assert all(weights[1] is layer.weight_hh_l0 for layer, weights in zip(model.layers, seen, strict=True))


@pytest.mark.parametrize(
    "kind", ["embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"]
)
def test_every_dropout_acts_in_training_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = lstm_lm(**{kind: 0.5})
    plain = lstm_lm()
    plain.load_state_dict(model.state_dict())
    tokens = ids(4, 12)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    loss = model.train().loss(tokens, tokens.roll(1))
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_memory_has_no_length() -> None:
    model = lstm_lm()
    assert model.config.context_length is None and model.make_state(2, 7).max_length is None
