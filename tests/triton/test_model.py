"""A whole model on the Triton kernels: prompt and steps of decoding, quantised and not, and a step of training."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tiny_models import VOCAB, llama, spread
from tolerance import assert_close_to_reference
from torch import Tensor, nn
from traced import Graphs

from fastlm import ops
from fastlm.models.base import CausalLM
from fastlm.nn.linear import QuantizedLinear

pytest.importorskip("triton.language", reason="triton is not installed")


def _quantised(model: CausalLM) -> CausalLM:
    """The model with the projections of its layers in Q4_1."""
    for module in list(model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                weight = ops.QuantizedTensor.quantize(layer.weight.detach(), "Q4_1")
                setattr(module, name, QuantizedLinear(weight, layer.bias, compute="exact"))
    return model


def _on(model: CausalLM, device: str) -> CausalLM:
    """A copy on the device, its quantised weights in planes also where the device is the CPU."""
    model = copy.deepcopy(model).to(device)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight = module.weight.relaid("planes")
    return model


def _decode(model: CausalLM, ids: Tensor, kv_dtype: torch.dtype | None = None) -> Tensor:
    """Logits of all positions: of five at once, then one by one."""
    state = model.make_state(len(ids), 24, kv_dtype=kv_dtype)
    with torch.no_grad():
        parts = [model(ids[:, :5], state), *(model(ids[:, t : t + 1], state) for t in range(5, ids.shape[1]))]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("quantised", [False, True])
def test_decoding(device: str, quantised: bool) -> None:
    model = spread(partial(llama, intermediate_size=64, window=6))
    model = _quantised(model) if quantised else model
    ids = torch.randint(VOCAB, (2, 8))
    with ops.backend("reference"):
        exact, same = _decode(copy.deepcopy(model).double(), ids), _decode(model, ids)
    with ops.backend("triton"):
        got = _decode(_on(model, device), ids.to(device))
    # Layers carry each other's rounding on: what torch's order of summation loses is one sample of it.
    assert_close_to_reference(got.cpu(), same, exact, factor=4, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_from_a_float8_cache(device: str, dtype: torch.dtype) -> None:
    model, ids, kind = spread(llama).to(dtype), torch.randint(VOCAB, (2, 8)), torch.float8_e4m3fn
    with ops.backend("reference"):
        wanted, plain = _decode(model, ids, kind), _decode(model, ids)
    with ops.backend("triton"):
        got = _decode(_on(model, device), ids.to(device), kind).cpu()
    # A key on the edge of two numbers may go either way: what is left is small against what the cache costs.
    assert (got - wanted).double().norm() < 0.3 * (plain - wanted).double().norm()


def test_training(device: str) -> None:
    model = spread(llama).train()
    ids = torch.randint(VOCAB, (2, 10))
    found = []
    for backend, this in (
        ("reference", copy.deepcopy(model).double()),
        ("reference", copy.deepcopy(model)),
        ("triton", copy.deepcopy(model).to(device)),
    ):
        with ops.backend(backend):
            loss = this.loss(ids[:, :-1].to(this.device), ids[:, 1:].to(this.device))
            loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in this.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[2]) > 10
    for exact, same, got in zip(*found, strict=True):
        assert_close_to_reference(got, same, exact, factor=4, floor=1e-5)


def test_compiled_training_runs_the_kernels_both_ways(device: str) -> None:
    """One graph each way, whose attention and its gradient are Triton's: no formula is traced in their place."""
    torch._dynamo.reset()
    model, graphs = spread(llama).train().to(device), Graphs()
    ids = torch.randint(VOCAB, (2, 10), device=device)
    found = []
    with ops.backend("triton"):
        for loss in (torch.compile(model.loss, fullgraph=True, backend=graphs), model.loss):
            model.zero_grad()
            value = loss(ids[:, :-1], ids[:, 1:])
            value.backward()
            found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
    assert [names.count("attention") + names.count("attention_backward") for names in graphs.ops] == [2, 2]
