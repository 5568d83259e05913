"""Optimiser groups, schedules and clipping against closed forms and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastlm.training import optimisation
from fastlm.training.config import TrainingConfig


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_only_matrices_that_are_no_embeddings_decay() -> None:
    model = _Tied()
    decayed, plain = optimisation.parameter_groups(model, 0.25)
    assert [id(p) for p in decayed["params"]] == [id(model.inner.weight)]
    assert decayed["weight_decay"] == 0.25
    expected = [model.embedding.weight, model.inner.bias, model.norm.weight, model.norm.bias, model.head.bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in expected}
    assert len(plain["params"]) == len(expected), "a shared parameter was counted twice"
    assert plain["weight_decay"] == 0.0


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="model: no parameter"):
        optimisation.build_optimizer(nn.Identity(), TrainingConfig())


def test_adamw_decay_is_decoupled_and_adam_is_not() -> None:
    """With zero gradients AdamW shrinks a weight by lr * decay; Adam takes the decay for a gradient and steps by lr."""
    for name, expected in (("adamw", 1 - 0.01 * 0.5), ("adam", 1 - 0.01)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        config = TrainingConfig(optimizer=name, learning_rate=0.01, weight_decay=0.5)
        optimizer = optimisation.build_optimizer(model, config)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


@given(
    warmup=st.integers(0, 50),
    total=st.integers(60, 500),
    peak=st.floats(1e-5, 1.0),
    ratio=st.floats(0.0, 1.0),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_schedule(warmup: int, total: int, peak: float, ratio: float, kind: str) -> None:
    config = TrainingConfig(
        learning_rate=peak, min_learning_rate=ratio * peak, warmup_steps=warmup, schedule=kind, max_steps=total
    )
    rates = [optimisation.learning_rate(step, config, total) for step in range(total + 5)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(peak * (step + 1) / warmup)
    assert rates[warmup] == pytest.approx(peak)
    end = peak if kind == "constant" else ratio * peak
    assert rates[total - 1 :] == pytest.approx([end] * 6)
    middle = (warmup + total - 1) / 2
    if kind != "constant" and middle == int(middle):
        assert rates[int(middle)] == pytest.approx((peak + end) / 2)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_cosine_quarter_points() -> None:
    config = TrainingConfig(learning_rate=1.0, min_learning_rate=0.0, warmup_steps=0)
    assert optimisation.learning_rate(25, config, 101) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert optimisation.learning_rate(75, config, 101) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_min_learning_rate_defaults_to_a_tenth() -> None:
    assert optimisation.learning_rate(99, TrainingConfig(learning_rate=0.5), 100) == pytest.approx(0.5)
    assert optimisation.learning_rate(999, TrainingConfig(learning_rate=0.5), 1000) == pytest.approx(0.05)


@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
def test_clipping_scales_to_the_limit_and_reports_the_norm_before(limit: float | None) -> None:
    model = nn.Linear(5, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = optimisation.clip_gradients(model, limit)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(before.norm().item())
    if limit == 0.5:
        assert after.norm().item() == pytest.approx(0.5, rel=1e-4)
        torch.testing.assert_close(after / after.norm(), before / before.norm())
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_state_goes_through_named_tensors_bit_for_bit(name: str) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    config = TrainingConfig(optimizer=name, learning_rate=0.1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optimisation.build_optimizer(model, config)
    steps(model, optimizer, 1)
    saved = {key: value.clone() for key, value in optimisation.state_tensors(model, optimizer).items()}
    assert "0.weight/" + ("momentum_buffer" if name == "sgd" else "exp_avg") in saved
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other.load_state_dict(model.state_dict())
    restored = optimisation.build_optimizer(other, config)
    optimisation.load_state_tensors(other, restored, saved, "file")
    steps(model, optimizer, 2)
    steps(other, restored, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused() -> None:
    model = nn.Linear(3, 4)
    optimizer = optimisation.build_optimizer(model, TrainingConfig())
    with pytest.raises(ValueError, match=r"file: optimizer state 'other/exp_avg'"):
        optimisation.load_state_tensors(model, optimizer, {"other/exp_avg": torch.zeros(1)}, "file")
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[4, 3\]"):
        optimisation.load_state_tensors(model, optimizer, {"weight/exp_avg": torch.zeros(3)}, "file")
    with pytest.raises(ValueError, match="no optimizer state for parameter 'bias'"):
        optimisation.load_state_tensors(model, optimizer, {"weight/exp_avg": torch.zeros(4, 3)}, "file")
