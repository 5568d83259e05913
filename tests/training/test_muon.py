"""Muon: its iteration, its update against the formula, and the AdamW beside it against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from training.runs import tiny_model

from fastlm.training import AdamW, optimisation
from fastlm.training.config import TrainingConfig
from fastlm.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (40, 9), (9, 40), (3, 16, 24), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    m = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s.clamp_min(0.05 * s.square().sum(-1, keepdim=True).sqrt())  # below, the iteration has not converged
    m = u * s[..., None, :] @ vh
    got = orthogonalize(m, dtype=dtype)
    inner = u.mT @ got @ vh.mT  # diagonal where the singular vectors are those of m
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert got.shape == m.shape and got.dtype is m.dtype
    assert values.min() > 0.6 and values.max() < 1.3
    off = inner - torch.diag_embed(values)
    assert off.abs().max() < (1e-4 if dtype is torch.float32 else 0.08)


def test_a_zero_gradient_gives_no_step() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def _formula(weight: Tensor, gradients: list[Tensor], lr: float, decay: float, mu: float) -> Tensor:
    """The update of Muon's docstring in float64, written out for one matrix."""
    w, b = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        g = gradient.double()
        b = mu * b + (1 - mu) * g
        x = (1 - mu) * g + mu * b
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        w = w - lr * decay * w - lr * 0.2 * max(w.shape) ** 0.5 * x
    return w


def _muon_run(fault: str | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What Muon makes of four matrices (two alike, one of them turned), and the formula."""
    weights = [torch.randn(6, 10), torch.randn(10, 6), torch.randn(6, 10), torch.randn(5, 5)]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(3)]
    expected = [_formula(w, [g[i] for g in gradients], 0.02, 0.3, 0.9) for i, w in enumerate(weights)]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": parameters, "muon": True, "weight_decay": 0.0 if fault == "no decay" else 0.3}]
    optimizer = Muon(groups, lr=0.02, momentum=0.8 if fault == "momentum" else 0.9)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.mT.reshape(gradient.shape) if fault == "turned" else gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters], expected


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_update_is_the_formula() -> None:
    _compare(*_muon_run())


@pytest.mark.parametrize("fault", ["no decay", "momentum", "turned"])
def test_planted_faults_are_found(fault: str) -> None:
    with pytest.raises(AssertionError):
        _compare(*_muon_run(fault))


def test_the_other_groups_are_adamw_bit_for_bit() -> None:
    ours = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizers = (
        Muon([{"params": ours.parameters()}], **settings),  # type: ignore[arg-type]
        AdamW(theirs.parameters(), **settings),  # type: ignore[arg-type]
    )
    x = torch.randn(7, 5)
    for _ in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step(max_norm=2.0)
    assert optimizers[0].norm == optimizers[1].norm
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fault", [None, "matrices not clipped"])
def test_clipping_counts_every_gradient(fault: str | None) -> None:
    weights = [torch.randn(6, 10), torch.randn(7)]
    gradients = [torch.randn_like(w) * 3 for w in weights]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    found = []
    for limit in (0.5, None):
        matrix, vector = parameters = [nn.Parameter(w.clone()) for w in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            clipped = limit is not None or (fault and parameter is matrix)
            parameter.grad = gradient.clone() if clipped else gradient * 0.5 / norm
        optimizer = Muon([{"params": [matrix], "muon": True}, {"params": [vector]}], lr=0.1)
        optimizer.step(max_norm=limit)
        if limit is not None:
            torch.testing.assert_close(optimizer.norm, norm)
        found.append(optimizer.state[matrix]["momentum"])
    if fault:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(*found)
    else:
        torch.testing.assert_close(*found)


def test_muon_gets_the_hidden_matrices_alone() -> None:
    model = tiny_model("gpt")
    optimizer = optimisation.build_optimizer(model, TrainingConfig(optimizer="muon", weight_decay=0.1))
    by_id = {id(p): name for name, p in model.named_parameters()}
    muon = {by_id[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    rest = {by_id[id(p)] for g in optimizer.param_groups if not g["muon"] for p in g["params"]}
    layer = "layers.0."
    hidden = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    assert muon == {f"{layer}{name}.weight" for name in hidden}
    assert "embedding.weight" in rest and rest | muon == set(by_id.values()) and not rest & muon
    model.output = nn.Linear(32, 8, bias=False)  # type: ignore[assignment]
    groups = optimisation.muon_groups(model, 0.1)
    assert any(p is model.output.weight for g in groups if not g.get("muon") for p in g["params"])


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match=r"groups: a parameter of shape \[3\], expected matrices"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])
