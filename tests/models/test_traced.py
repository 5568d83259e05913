"""Whole models under torch.compile and torch.export: one graph, in which the work is our ops'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import TINY, VOCAB, spread
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Graphs, ops_of

from fastlm.models.base import CausalLM
from fastlm.nn.rotary import Rotary

FAMILIES = ["gpt", "llama-window-interleaved"]
# What is not ours in a forward pass, besides views: looking up, positions and their angles, dropout that drops nothing.
PLUMBING = {"embedding", "arange", "add", "mul", "cos", "sin", "dropout", "_assert_tensor_metadata"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_one_graph_of_our_ops(family: str) -> None:
    model, graphs = spread(TINY[family]).train(), Graphs()
    ids = torch.randint(VOCAB, (2, 10))
    results = []
    for loss in (torch.compile(model.loss, fullgraph=True, backend=graphs), model.loss):
        model.zero_grad()
        value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-4, atol=2e-6)
    forward, backward = (Counter(names) for names in graphs.ops)
    norm = "layer_norm" if family == "gpt" else "rms_norm"
    assert (forward["attention"], forward[norm], forward[f"add_{norm}"], forward["cross_entropy"]) == (2, 1, 4, 1)
    assert backward["attention_backward"] == 2


def _elsewhere(make: Callable[[], CausalLM]) -> CausalLM:
    """A model on a device that is not the CPU: the way through our code is then a GPU's.

    The meta device, for without a driver torch cannot even pretend to index a CUDA tensor.
    """
    with torch.device("meta"):
        model = make().eval()
    for module in model.modules():
        if isinstance(module, Rotary):
            module.frequencies = module.frequencies.to("meta")  # as a first call does
    return model


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_on_another_device_is_one_graph_of_our_ops(family: str, strict: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _elsewhere(TINY[family])
        program = torch.export.export(model, (torch.zeros(2, 9, dtype=torch.int64, device="meta"),), strict=strict)
    found = ops_of(program.graph_module)
    ours = Counter(op._opname for op in found if op.namespace == "fastlm")
    norm = "layer_norm" if family == "gpt" else "rms_norm"
    assert (ours["attention"], ours[norm], ours[f"add_{norm}"]) == (2, 1, 4)
    assert ours["linear"] == (9 if family == "gpt" else 15)
    others = {op._opname for op in found if op.namespace != "fastlm" and not _is_view(op)}
    assert others <= PLUMBING


def _is_view(op: OpOverload) -> bool:
    return all(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_gives_the_same_logits(family: str) -> None:
    model = spread(TINY[family])
    ids = torch.randint(VOCAB, (2, 9))
    program = torch.export.export(model, (ids,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_is_one_graph(family: str) -> None:
    model, graphs = spread(TINY[family]), Graphs()
    ids = torch.randint(VOCAB, (2, 6))

    def logits(step: torch.nn.Module) -> Tensor:
        state = model.make_state(2, 16)
        with torch.no_grad():
            return torch.cat([model(ids[:, :4], state), *(step(ids[:, t : t + 1], state) for t in (4, 5))], dim=1)

    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    torch.testing.assert_close(logits(compiled), logits(model))
    assert graphs.ops and all(names.count("attention_decode") == 2 for names in graphs.ops)
