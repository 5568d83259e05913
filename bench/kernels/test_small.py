"""What stands between the products: norms, rotary embedding, activations, the loss, the choice of a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

_SHAPES = pytest.mark.parametrize("shape", [(1, 576), (512, 768)], ids=str)


@_SHAPES
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_norm(race: Callable[..., None], name: str, shape: tuple[int, int]) -> None:
    weights = [torch.randn(shape[-1]) for _ in range(1 if name.endswith("rms_norm") else 2)]
    race(name, *(torch.randn(shape) for _ in range(1 + name.startswith("add"))), *weights)


@_SHAPES
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_activation(race: Callable[..., None], name: str, shape: tuple[int, int]) -> None:
    race(name, *(torch.randn(shape) for _ in range(1 if name == "gelu" else 2)))


@pytest.mark.parametrize("shape", [(1, 9, 1, 64), (1, 9, 512, 64)], ids=str)
def test_rotary(race: Callable[..., None], shape: tuple[int, int, int, int]) -> None:
    angles = torch.randn(shape[2], shape[3] // 2)
    race("rotary", torch.randn(shape), angles.cos(), angles.sin())


@pytest.mark.parametrize("shape", [(64, 256, 10_000), (512, 128, 1_000)], ids=str)
def test_cross_entropy(race: Callable[..., None], shape: tuple[int, int, int]) -> None:
    rows, width, vocabulary = shape
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * width**-0.5
    race("cross_entropy", hidden, weight, torch.randint(vocabulary, (rows,)))


@pytest.mark.parametrize("shape", [(1, 50_257), (8, 50_257), (1, 128_256)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 50}, {"temperature": 0.8, "top_p": 0.9}],
    ids=str,
)
def test_sample(race: Callable[..., None], shape: tuple[int, int], options: dict[str, float]) -> None:
    logits = 2.5 * torch.randn(shape)
    race("sample", logits, **options, seed=1, moved=logits.nbytes, error=0)  # the very same tokens
