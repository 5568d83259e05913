"""Products with weights in each format: one row (decoding), a few (a batch), many (a prompt)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastlm.ops import QuantizedTensor

_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


@pytest.mark.parametrize("shape", [(1, 576, 1536), (8, 576, 1536), (1, 576, 49152), (128, 576, 1536)], ids=str)
@pytest.mark.parametrize("compute", ["fast", "exact"])
@pytest.mark.parametrize("kind", _KINDS)
def test_linear(race: Callable[..., None], shape: tuple[int, int, int], kind: str, compute: str) -> None:
    rows, inputs, outputs = shape
    weight = QuantizedTensor.quantize(torch.randn(outputs, inputs), kind)
    # Activations in 8 bits are off by about 1 in 250 each; bfloat16 where torch has only that.
    race("linear", torch.randn(rows, inputs), weight, compute=compute, moved=weight.nbytes, error=2e-2)
