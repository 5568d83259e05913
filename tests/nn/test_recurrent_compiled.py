"""fastlm.nn's recurrent modules under torch.compile and torch.export: no graph break, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastlm.nn


def leaves(results: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]


def outputs_and_gradients(module: Any, input: Tensor) -> list[Tensor]:
    results = leaves(module(input))
    return results + list(torch.autograd.grad([r.square().sum() for r in results], list(module.parameters())))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_compiles_without_a_graph_break(name: str) -> None:
    ours = getattr(fastlm.nn, name)(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(3, 4, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(ours, x), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x))


@pytest.mark.parametrize("is_sorted", [False, True])
def test_packed_input_compiles_without_a_graph_break(is_sorted: bool) -> None:
    ours = fastlm.nn.LSTM(5, 6, num_layers=2, bidirectional=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for lengths in ((4, 3, 1), (5, 2, 2, 2)):
        packed = pack_sequence([torch.randn(length, 5) for length in lengths], enforce_sorted=is_sorted)
        for a, b in zip(leaves(compiled(packed)), leaves(ours(packed)), strict=True):
            torch.testing.assert_close(a, b)


def test_dropout_compiled_is_the_same_in_forward_and_backward() -> None:
    """The derivative along a direction, from differences under one seed, equals the gradient's."""
    ours = fastlm.nn.LSTM(5, 6, num_layers=3, bidirectional=True, dropout=0.5, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, direction = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def run(step: float) -> Tensor:
        torch.manual_seed(0)
        point = (x + step * direction).requires_grad_()
        value = compiled(point)[0].square().sum()
        return value if step else (torch.autograd.grad(value, point)[0] * direction).sum()

    assert run(1e-5).detach() != compiled(x)[0].square().sum().detach(), "no dropout, or none that follows the seed"
    torch.testing.assert_close((run(1e-5) - run(-1e-5)).detach() / 2e-5, run(0.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_compile_without_a_graph_break(name: str) -> None:
    ours = getattr(fastlm.nn, name)(5, 6)
    x = torch.randn(3, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(ours, x), strict=True):
        torch.testing.assert_close(a, b)


def test_exports() -> None:
    ours = fastlm.nn.LSTM(5, 6, num_layers=2)
    x = torch.randn(3, 4, 5)
    program = torch.export.export(ours, (x,))
    assert any(node.target is torch.ops.fastlm.lstm.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), ours(x))
