"""feed_forward: the ops one after another, to the bit, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.kernels import native
from fastlm.nn.mlp import MLP, SwiGLU

needs_native = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")


def _problem(gated: bool, biased: bool, shape: tuple[int, ...] = (3, 7, 24)) -> dict[str, Tensor]:
    sizes = {"input": shape, "up": (40, 24), "down": (17, 40), "up_bias": (40,), "down_bias": (17,)}
    sizes |= {"gate": (40, 24), "gate_bias": (40,)}
    left_out = ([] if gated else ["gate", "gate_bias"]) + ([] if biased else ["up_bias", "down_bias", "gate_bias"])
    return {name: torch.randn(size) for name, size in sizes.items() if name not in left_out}


def _apart(
    input: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    inner = ops.linear(input, up, up_bias)
    active = ops.gelu(inner) if gate is None else ops.swiglu(ops.linear(input, gate, gate_bias), inner)
    return ops.linear(active, down, down_bias)


def _run(op: Callable[..., Tensor], tensors: dict[str, Tensor], mixed: bool) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        y = op(**leaves)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].dtype is want.dtype
        if name == "input" and "gate" in expected:  # a sum of two products, rounded in another place
            torch.testing.assert_close(found[name], want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
        else:
            assert torch.equal(found[name], want), name


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_ops_one_after_another(gated: bool, biased: bool, mixed: bool) -> None:
    for shape in ((5, 24), (2, 40, 24)):
        tensors = _problem(gated, biased, shape)
        _compare(_run(ops.feed_forward, tensors, mixed), _run(_apart, tensors, mixed))


@needs_native
@pytest.mark.parametrize("name", ["input", "up", "down", "up_bias", "down_bias", "gate", "gate_bias"])
def test_gradients_that_nobody_wants_are_left_out(name: str) -> None:
    tensors = _problem(True, True)
    tensors[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.feed_forward(**tensors)
    y.float().sum().backward()
    assert [n for n, t in tensors.items() if t.grad is not None] == [name]


@needs_native
@pytest.mark.parametrize("fault", ["activation left out", "gate and up swapped", "gradient of down for up"])
def test_planted_faults_are_found(fault: str) -> None:
    tensors = _problem(True, True)
    found, expected = _run(ops.feed_forward, tensors, True), _run(_apart, tensors, True)
    _compare(found, expected)
    if fault == "activation left out":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear = ops.linear(ops.linear(tensors["input"], tensors["up"]), tensors["down"], tensors["down_bias"])
        wrong = found | {"output": linear}
    elif fault == "gate and up swapped":
        swapped = {**tensors, "gate": tensors["up"], "up": tensors["gate"]}
        wrong = _run(ops.feed_forward, swapped, True)
    else:
        wrong = found | {"up": found["gate"]}
    with pytest.raises(AssertionError):
        _compare(wrong, expected)


@needs_native
def test_one_node_in_training() -> None:
    x = torch.randn(4, 8)
    for block in (MLP(8, 16), SwiGLU(8, 16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            node = block(x).grad_fn
            while node is not None and "FeedForward" not in node.name():
                node = node.next_functions[0][0]
            assert node is not None
            assert all("AccumulateGrad" in f.name() for f, _ in node.next_functions if f is not None)


def test_a_replaced_or_hooked_layer_is_called() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x, called = torch.randn(4, 8), []
    for block, name in ((MLP(8, 16), "up"), (SwiGLU(8, 16), "gate")):
        plain = block(x)
        handle = getattr(block, name).register_forward_hook(lambda *_: called.append(1))
        torch.testing.assert_close(block(x), plain)
        handle.remove()
        handle = block.down.register_full_backward_hook(lambda *_: called.append(1))
        block(x.clone().requires_grad_()).sum().backward()
        handle.remove()
        twice = Twice(8, 16)
        twice.load_state_dict(getattr(block, name).state_dict() | {"bias": torch.zeros(16)})
        setattr(block, name, twice)
        assert not torch.allclose(block(x), plain)
    assert called == [1, 1, 1, 1]


def test_traced_and_second_derivatives() -> None:
    tensors = _problem(False, True)
    traced = torch.compile(lambda t: ops.feed_forward(**t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(tensors), ops.feed_forward(**tensors))
    wide = {name: t.double().requires_grad_() for name, t in _problem(True, True, (2, 24)).items()}
    assert torch.autograd.gradcheck(lambda x: ops.feed_forward(**(wide | {"input": x})), wide["input"])


def test_errors_name_the_argument() -> None:
    x, up, down = torch.randn(2, 8), torch.randn(16, 8), torch.randn(8, 16)
    with pytest.raises(ValueError, match="feed_forward: gate_bias is given, expected None"):
        ops.feed_forward(x, up, down, gate_bias=torch.randn(16))
    with pytest.raises(ValueError, match=r"linear: input is float32 \[2, 7\]"):
        ops.feed_forward(x[:, :7], up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="bias"):
        ops.feed_forward(x.requires_grad_(), up, down, up_bias=torch.zeros(1))
