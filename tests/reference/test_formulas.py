"""The formulas of the norms, rotary embedding and loss, against torch's operators in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.reference.cross_entropy import cross_entropy
from fastlm.reference.layer_norm import layer_norm
from fastlm.reference.rms_norm import rms_norm
from fastlm.reference.rotary import rotary


def test_layer_norm() -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 7), (7,), (7,)))
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-3), functional.layer_norm(x, (7,), weight, bias, 1e-3))
    torch.testing.assert_close(layer_norm(x, None, None, 1e-3), functional.layer_norm(x, (7,), None, None, 1e-3))
    assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, 1e-3), (x, weight, bias))


def test_rms_norm() -> None:
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 7), (7,)))
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), functional.rms_norm(x, (7,), weight, 1e-3))
    torch.testing.assert_close(rms_norm(x, None, 1e-3), functional.rms_norm(x, (7,), None, 1e-3))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-3), (x, weight))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [0, 4, 6])
def test_rotary_multiplies_complex_numbers(interleaved: bool, rotated: int) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(2, 5, rotated // 2, dtype=torch.float64)
    head = x.detach()[..., :rotated]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    expected = torch.cat((turned, x.detach()[..., rotated:]), dim=-1)
    torch.testing.assert_close(rotary(x, angle.cos(), angle.sin(), interleaved), expected)
    assert torch.autograd.gradcheck(lambda t: rotary(t, angle.cos(), angle.sin(), interleaved), (x,))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_by_its_definition(reduction: str) -> None:
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 4), (6, 4), (6,)))
    target = torch.randint(6, (9,))
    target[2] = 5
    kept = target != 5
    p = torch.softmax(hidden @ weight.T + bias, dim=-1)
    wanted = 0.9 * functional.one_hot(target, 6) + 0.1 / 6
    losses = -(wanted * p.log()).sum(dim=-1) * kept
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / kept.sum()}[reduction]
    torch.testing.assert_close(cross_entropy(hidden, weight, target, bias, 5, 0.1, reduction, 1), expected)
    assert torch.autograd.gradcheck(
        lambda h, w, b: cross_entropy(h, w, target, b, 5, 0.1, reduction, 1), (hidden, weight, bias)
    )
