"""accelerate and restore: the same numbers, the same module, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm.nn.linear import QuantizedLinear


class Tagger(nn.Module):
    """What people write: layers of several kinds, one inside a container."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
        self.lstm = nn.LSTM(64, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(64, 24, batch_first=True)
        self.rnn = nn.RNN(24, 24, nonlinearity="relu")
        self.cell = nn.LSTMCell(24, 16)
        self.out = nn.Linear(16, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.encoder(self.embedding(ids)))
        x, _ = self.gru(x)
        x, _ = self.rnn(x)
        h, c = self.cell(x[:, -1])
        return self.out(h + c)


class MyLSTM(nn.LSTM):
    pass


IDS = torch.arange(60).reshape(4, 15) % 50


def test_recurrent_modules_give_the_same_and_come_back() -> None:
    model = Tagger()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    want = model(IDS)
    want.sum().backward()
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    model.zero_grad()
    report = fastlm.accelerate(model)
    assert set(report.swapped) == {"lstm", "gru", "rnn", "cell"} and not report.kept
    assert "torch.nn.LSTM -> fastlm.nn.LSTM" in str(report)
    assert type(model.lstm) is fastlm.nn.LSTM and type(model.cell) is fastlm.nn.LSTMCell
    got = model(IDS)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    got.sum().backward()
    torch.testing.assert_close([p.grad for p in parameters if p.grad is not None], grads, atol=1e-4, rtol=1e-3)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert set(fastlm.restore(model).swapped) == {"lstm", "gru", "rnn", "cell"}
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert torch.equal(model(IDS), want)


def test_state_dicts_and_hooks_do_not_notice() -> None:
    model, other = Tagger(), Tagger()
    calls: list[str] = []
    model.lstm.register_forward_hook(lambda *_: calls.append("hook"))
    fastlm.accelerate(model)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(IDS), other(IDS), atol=1e-5, rtol=1e-4)
    assert calls == ["hook"]
    fastlm.restore(model)
    other.load_state_dict(model.state_dict())
    model.eval()
    assert not model.lstm.training


def test_an_optimiser_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = Tagger()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlm.accelerate(model)
    first = model(IDS).square().mean()
    first.backward()
    optimiser.step()
    assert model(IDS).square().mean() < first
    fastlm.restore(model)
    assert model(IDS).square().mean() < first


def test_linear_layers_are_quantised_where_asked_for() -> None:
    model = Tagger().eval()
    with torch.no_grad():
        want = model(IDS)
    report = fastlm.accelerate(model, recurrent=False, linear="Q8_0")
    assert set(report.swapped) == {"encoder.0"}
    assert report.kept == {"out": "16 inputs, which are no whole number of blocks of 32"}
    assert isinstance(model.encoder[0], QuantizedLinear) and "Q8_0" in report.swapped["encoder.0"]
    with torch.no_grad():
        got = model(IDS)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.05)
    assert "encoder.0.weight" not in model.state_dict()
    fastlm.restore(model)
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
    assert "encoder.0.weight" in model.state_dict()


def test_what_is_kept_is_told() -> None:
    model = nn.ModuleDict(
        {"mine": MyLSTM(4, 4), "normed": nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0")}
    )
    report = fastlm.accelerate(model)
    assert not report.swapped
    assert "MyLSTM" in report.kept["mine"] and "parametrized" in report.kept["normed"]
    assert "MyLSTM" in str(report)
    assert fastlm.restore(model).swapped == {}


def test_a_module_of_ours_stays_ours() -> None:
    model = nn.ModuleDict({"ours": fastlm.nn.LSTM(4, 4), "theirs": nn.LSTM(4, 4)})
    fastlm.accelerate(model)
    fastlm.restore(model)
    assert type(model["ours"]) is fastlm.nn.LSTM and type(model["theirs"]) is nn.LSTM


def test_a_single_module_and_twice_over() -> None:
    lstm: Any = nn.LSTM(4, 4)
    assert set(fastlm.accelerate(lstm).swapped) == {""}
    assert fastlm.accelerate(lstm).swapped == {}
    assert type(lstm) is fastlm.nn.LSTM
    fastlm.restore(lstm)
    assert type(lstm) is nn.LSTM
    linear = nn.Linear(32, 4)
    assert "the model itself" in fastlm.accelerate(linear, linear="Q8_0").kept[""]
    with pytest.raises(ValueError, match="linear: 'int8' is not one of"):
        fastlm.accelerate(lstm, linear="int8")
