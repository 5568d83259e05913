"""What holds for every recurrent op: inputs whose features differ in scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_close_to_reference

from fastlm import ops
from fastlm.kernels import native

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


def _run(kind: str, x: torch.Tensor, hidden: int, weights: list[torch.Tensor]) -> torch.Tensor:
    state = x.new_zeros(1, x.shape[1], hidden)
    op: Any = getattr(ops, kind)
    output: torch.Tensor = op(x, (state, state) if kind == "lstm" else state, weights)[0]
    return output


@needs_native
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("inputs", [64, 50])
def test_features_of_different_scales(kind: str, scale: float, inputs: int) -> None:
    """An input need not have one scale: prices beside shares. Float keeps each product's digits, so must every kernel.

    Integers in units of a row's largest number, right for states between -1 and 1, do not (csrc/cpu/digits.h): such an
    input is multiplied in floats, or as bfloat16 parts (csrc/cpu/amx.h).
    """
    torch.manual_seed(0)
    steps, batch, hidden = 6, 21, 72
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](inputs, hidden)
    x = torch.randn(steps, batch, inputs)
    with torch.no_grad():
        x[..., :8] *= scale
        module.weight_ih_l0[:, :8] /= scale
        weights = list(module.parameters())
        with ops.backend("reference"):
            exact = _run(kind, x.double(), hidden, [w.double() for w in weights])
        with ops.backend("cpu"):
            fast = _run(kind, x, hidden, weights)
        assert_close_to_reference(fast, module(x)[0], exact)


@needs_native
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_rows_of_different_scales(kind: str) -> None:
    """Small rows go in digits, large ones as parts; the same chunk has both."""
    torch.manual_seed(2)
    steps, batch, inputs, hidden = 30, 24, 70, 72  # more than a chunk
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](inputs, hidden)
    x = torch.randn(steps, batch, inputs) * torch.logspace(-4, 2, 20)[torch.randint(20, (steps, batch, 1))]
    x[3, 5], x[4, 5, 1:] = 0, 0
    with torch.no_grad():
        weights = list(module.parameters())
        with ops.backend("reference"):
            exact = _run(kind, x.double(), hidden, [w.double() for w in weights])
        with ops.backend("cpu"):
            fast = _run(kind, x, hidden, weights)
        assert_close_to_reference(fast, module(x)[0], exact)


@needs_native
@pytest.mark.parametrize("what", ["input", "w_ih", "w_hh"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_gradients_beside_one_large_number(kind: str, what: str) -> None:
    """One spike in a feature, or one unit with large weights, so that it saturates: other gradients stay exact."""
    torch.manual_seed(1)
    steps, batch, inputs, hidden = 40, 16, 128, 128
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](inputs, hidden)
    x = torch.randn(steps, batch, inputs)
    upstream = torch.randn(steps, batch, hidden)
    with torch.no_grad():
        if what == "input":
            x[3, 7, 3] = 1e4
            module.weight_ih_l0[:, 3] = module.weight_ih_l0[:, 3].sign() * 0.05
        else:
            getattr(module, "weight_ih_l0" if what == "w_ih" else "weight_hh_l0")[5] *= (
                1e3 if kind != "rnn" else 20
            )  # more is chaos

    def gradients(dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *module.parameters())]
        if backend is None:
            output = module(leaves[0])[0]
            return list(torch.autograd.grad((output * upstream).sum(), [leaves[0], *module.parameters()]))
        with ops.backend(backend):
            output = _run(kind, leaves[0], hidden, leaves[1:])
        return list(torch.autograd.grad((output * upstream.to(dtype)).sum(), leaves))

    exact = gradients(torch.float64, "reference")
    for fast, torchs, reference in zip(
        gradients(torch.float32, "cpu"), gradients(torch.float32, None), exact, strict=True
    ):
        assert_close_to_reference(fast, torchs, reference, factor=3.0, floor=2e-6)


@needs_native
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_one_large_row_among_small_ones_with_and_without_gradients(kind: str) -> None:
    """W_ih is packed as parts for that row; before a backward pass only because of it. The others keep their bits."""
    torch.manual_seed(3)
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](70, 72)
    weights, x = list(module.parameters()), torch.randn(30, 24, 70)
    with ops.backend("cpu"):
        small = _run(kind, x, 72, weights)
        x[29, 5, 3] = 1e4
        large = _run(kind, x, 72, weights)
        with torch.no_grad():
            assert torch.equal(_run(kind, x, 72, weights), large)
    exact = _run(kind, x.double(), 72, [w.double() for w in weights])
    assert_close_to_reference(large, module(x)[0], exact)
    same = torch.ones(30, 24, dtype=torch.bool)
    same[29, 5] = False
    assert torch.equal(large[same], small[same])


@needs_native
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_gradients_beside_large_first_states(kind: str) -> None:
    """First states beyond -1..1 are not the unit of all states in W_hh's gradient."""
    torch.manual_seed(4)
    steps, batch, inputs, hidden = 60, 7, 40, 100
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](inputs, hidden)
    x, h0, upstream = (torch.randn(*s) for s in ((steps, batch, inputs), (1, batch, hidden), (steps, batch, hidden)))

    def gradient(dtype: torch.dtype, backend: str | None) -> torch.Tensor:
        weights = [w.detach().to(dtype).requires_grad_() for w in module.parameters()]
        h = h0.to(dtype)
        states: Any = (h, torch.zeros_like(h)) if kind == "lstm" else h
        if backend is None:
            output, weights = module(x, states)[0], list(module.parameters())
        else:
            with ops.backend(backend):
                op: Any = getattr(ops, kind)
                output = op(x.to(dtype), states, weights)[0]
        return torch.autograd.grad((output * upstream.to(dtype)).sum(), weights[1])[0].double()

    exact = gradient(torch.float64, "reference")
    mine, torchs = ((gradient(torch.float32, b) - exact).norm() for b in ("cpu", None))
    assert mine <= 3 * torchs
