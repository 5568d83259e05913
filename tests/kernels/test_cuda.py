"""The CUDA module: it says why it is not used; with a device, the cell meets the bound of the design."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_reference

from fastlm import ops
from fastlm.kernels import cuda, native
from fastlm.reference import lstm as reference


def _case(device: str) -> tuple[torch.Tensor, ...]:
    shapes = ((5, 7), (5, 33), (5, 33), (132, 7), (132, 33), (132,), (132,))
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def test_without_a_device_the_reason_is_told() -> None:
    if torch.cuda.is_available() and native.CUDA.module is not None:
        pytest.skip("there is a device")
    x, h, c, *weights = _case("cpu")
    reasons = dict(ops.explain("lstm_cell", x, (h, c), *weights).reasons)
    assert reasons["cuda"] == cuda.unavailable()
    with ops.backend("cuda"), pytest.raises(NotImplementedError, match=r"CUDA|_cuda"):
        ops.lstm_cell(x, (h, c), *weights)


@pytest.mark.skipif(native.CUDA.module is None, reason=str(native.CUDA.error))
def test_the_module_loads_without_a_device() -> None:
    count = native.CUDA.require().device_count()
    assert count >= 0
    if count == 0:
        with pytest.raises(RuntimeError, match="lstm_cell: "):
            native.CUDA.require().lstm_cell(0, 0, 0, 0, 0, 1, 1, 0)


@pytest.mark.gpu
def test_cell_on_a_device() -> None:
    x, h, c, *weights = _case("cuda")
    with ops.backend("cuda"):
        found = ops.lstm_cell(x, (h, c), *weights)
    with ops.backend("torch"):
        peer = ops.lstm_cell(x, (h, c), *weights)
    exact = reference.lstm_cell(*(t.double() for t in (x, h, c, *weights)))
    for ours, theirs, want in zip(found, peer, exact, strict=True):
        assert_close_to_reference(ours.cpu(), theirs.cpu(), want.cpu())
