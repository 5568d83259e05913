"""The linear and embedding modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastlm.nn.embedding import QuantizedEmbedding
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.ops import QuantizedTensor


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_linear(bias: bool) -> None:
    ours, theirs = Linear(48, 33, bias=bias), nn.Linear(48, 33, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_linear(kind: str) -> None:
    weight, bias = QuantizedTensor.quantize(torch.randn(33, 64), kind), torch.randn(33)
    exact, fast = QuantizedLinear(weight, bias, compute="exact"), QuantizedLinear(weight, bias)
    x = torch.randn(5, 64)
    expected = nn.functional.linear(x, weight.dequantize(), bias)
    with torch.no_grad():
        torch.testing.assert_close(exact(x), expected)
        assert (fast(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert (exact.out_features, exact.in_features) == (33, 64)
    assert list(exact.state_dict()) == ["bias"] and not exact.bias.requires_grad
    assert f"kind={kind}" in repr(exact)


def test_a_move_keeps_the_bytes() -> None:
    weight = QuantizedTensor.quantize(torch.randn(4, 64), "Q4_1")
    layer, table = QuantizedLinear(weight), QuantizedEmbedding(weight)
    assert layer.half().weight is weight and table.double().weight is weight and table.to("cpu").weight is weight
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight.data, weight.data)
    assert layer.to("meta").weight.data.is_meta and not weight.data.is_meta


def test_quantized_embedding() -> None:
    weight = QuantizedTensor.quantize(torch.randn(7, 64), "Q8_0")
    table = QuantizedEmbedding(weight)
    ids = torch.tensor([[1, 6], [0, 1]])
    assert torch.equal(table(ids), nn.functional.embedding(ids, weight.dequantize()))
    assert not list(table.parameters()) and not table.state_dict()
    with pytest.raises(IndexError, match="id 7"):
        table(torch.tensor([7]))
