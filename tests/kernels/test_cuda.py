"""The CUDA module: it says why it is not used; with a device, its kernels meet the bound of the design.

What needs no device is in test_cuda_on_cpu.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_cases import Case, Inputs, call, make_inputs, named_results, run_reference
from tolerance import assert_close_to_reference

from fastlm import ops
from fastlm.kernels import cuda, native
from fastlm.reference import lstm as reference


def _case(device: str, batch: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((batch, 7), (batch, 33), (batch, 33), (132, 7), (132, 33), (132,), (132,))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


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
    module = native.CUDA.require()
    assert module.device_count() >= 0 and not module.on_cpu
    if module.device_count() == 0:
        assert module.device_error()
        for call_kernel in (
            lambda: module.lstm_cell(0, 1, 1, {}, 0),
            lambda: module.sample(0, 1, 1, 1, [0.0] * 6, [0] * 6, [0] * 6, [0] * 6, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        ):
            with pytest.raises(RuntimeError, match=r"lstm_cell: |sample: "):
                call_kernel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_step_on_a_device(batch: int, dtype: torch.dtype) -> None:
    x, h, c, *weights = _case("cuda", batch, dtype)
    with ops.backend("cuda"):
        found = ops.lstm_cell(x, (h, c), *weights)
    with ops.backend("torch"):
        peer = ops.lstm_cell(x, (h, c), *weights)
    exact = reference.lstm_cell(*(t.double() for t in (x, h, c, *weights)))
    for ours, theirs, want in zip(found, peer, exact, strict=True):
        assert_close_to_reference(ours.cpu(), theirs.cpu(), want.cpu(), floor=2 * float(torch.finfo(dtype).eps))


def _on_device(inputs: Inputs) -> Inputs:
    def move(tensors: Any) -> Any:
        return [None if t is None else t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]

    (x,) = move([inputs.input])
    moved = (move(group) for group in (inputs.states, inputs.weights))
    return Inputs(x, *moved, inputs.batch_sizes, move(inputs.grads), move(inputs.noise))


@pytest.mark.gpu
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("hidden", "batch"), [(33, 1), (650, 20), (1024, 16)])
@pytest.mark.parametrize("op", ["lstm_variant", "gru_variant"])
def test_variants_on_a_device(op: str, hidden: int, batch: int, layer_norm: bool) -> None:
    torch.manual_seed(0)
    lengths = tuple(max(1, 12 - row) for row in range(batch))
    case = Case(op, hidden=hidden, width=16, lengths=lengths, layer_norm=layer_norm, noise="dhc")
    case = replace(case, bidirectional=True)
    single = make_inputs(case).to(torch.float32)
    exact = named_results(case, single.to(torch.float64), run_reference)
    peer = named_results(case, single, run_reference)

    def by_cuda(case: Case, inputs: Inputs) -> list[torch.Tensor]:
        with ops.backend("cuda"):
            return call(case, inputs)

    for name, found in named_results(case, _on_device(single), by_cuda).items():
        assert_close_to_reference(found.cpu(), peer[name], exact[name], floor=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
def test_tokens_on_a_device_are_those_of_the_cpu(batch: int, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(batch, vocab) * 3
    history = torch.randint(vocab, (batch, 40))
    for options in (
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_k": 200, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.1, "history": history},
        {"temperature": torch.linspace(0, 2, batch, dtype=torch.float64), "logit_bias": torch.randn(vocab)},
    ):
        for position in range(4):
            with ops.backend("cpu"):
                want = ops.sample(logits, position=position, **options).tolist()
            with ops.backend("cuda"):
                found = ops.sample(logits.cuda(), position=position, **options).tolist()
            assert found == want
