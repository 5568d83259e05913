"""Attention under torch.compile: one op and its gradient behind every door, the same numbers as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from traced import Graphs

from fastlm import ops
from fastlm.ops import attention_traced
from fastlm.ops.attention_kernels import Kernel, kernel_for
from fastlm.reference.attention import Options

STARTS_Q, STARTS_K = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _dense() -> list[Tensor]:
    return [_leaf(2, 4, 3, 8), _leaf(2, 2, 5, 8), _leaf(2, 2, 5, 6)]


def _packed() -> list[Tensor]:
    return [_leaf(5, 4, 8), _leaf(7, 2, 8), _leaf(7, 2, 6)]


def _varlen(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    longest = {} if options.pop("unknown", False) else {"max_seqlen_q": 3, "max_seqlen_k": 4}
    return ops.attention_varlen(query, key, value, STARTS_Q, STARTS_K, **longest, **options)


# name: the door, its tensors, its options
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]], dict[str, Any]]] = {
    "plain": (ops.attention, _dense, {}),
    "causal": (ops.attention, _dense, {"causal": True}),
    "window and softcap": (ops.attention, _dense, {"causal": True, "window": 2, "softcap": 3.0}),
    "boolean mask": (ops.attention, _dense, {"causal": True, "mask": torch.rand(2, 1, 3, 5) < 0.7}),
    "mask and slopes": (ops.attention, _dense, {"mask": torch.randn(1, 4, 3, 5), "alibi_slopes": torch.rand(4)}),
    "gradients of both": (ops.attention, _dense, {"mask": _leaf(1, 4, 3, 5), "alibi_slopes": _leaf(4)}),
    "sinks": (ops.attention, _dense, {"causal": True, "top_left": True, "sinks": _leaf(4)}),
    "lse": (ops.attention_lse, _dense, {"causal": True}),
    "lse with sinks": (ops.attention_lse, _dense, {"window": 2, "sinks": _leaf(4)}),
    "packed": (_varlen, _packed, {"causal": True}),
    "packed, lengths unknown": (_varlen, _packed, {"window": 2, "unknown": True}),
    "packed with slopes": (_varlen, _packed, {"alibi_slopes": _leaf(4), "sinks": _leaf(4)}),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(call: str, compiled_by: str | None = None) -> Graphs:
    """Results and gradients of a call, compiled in one graph, against the same in eager mode."""
    door, make, options = CALLS[call]
    tensors, graphs = make(), Graphs()
    leaves = tensors + [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    results = []
    forced = nullcontext() if compiled_by is None else ops.backend(compiled_by)
    for run in (torch.compile(door, fullgraph=True, backend=graphs), door):
        with forced if run is not door else nullcontext():
            found = run(*tensors, **options)
            found = found if isinstance(found, tuple) else (found,)
            torch.manual_seed(1)
            grads = torch.autograd.grad(found, leaves, [torch.randn(f.shape) for f in found])
        results.append([*found, *grads])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    return graphs


@pytest.mark.parametrize("call", CALLS)
def test_forward_and_backward_are_one_op_each(call: str) -> None:
    assert compare(call).ops == [["attention"], ["attention_backward"]]


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_traced._gradients

    def without_lse(grad_output: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
        return right(grad_output, None, *rest)

    def swapped(*args: Any) -> Any:
        first, second, *rest = right(*args)
        return [first, second * 2, *rest]

    for call, wrong in (("lse", without_lse), ("causal", swapped), ("packed", swapped)):
        torch._dynamo.reset()
        compare(call)
        torch._dynamo.reset()
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(attention_traced, "_gradients", wrong)
            compare(call)


@pytest.mark.parametrize("call", [name for name in CALLS if "unknown" not in name])
def test_opcheck(call: str) -> None:
    door, make, options = CALLS[call]
    tensors = make()
    o = Options(**{"causal": False, "mask": None, "scale": 0.5, **options})
    where = (STARTS_Q, STARTS_K, 3, 4) if door is _varlen else (None, None, 0, 0)
    rest = (*o[:9], None, *where)
    want_lse = door is ops.attention_lse
    torch.library.opcheck(torch.ops.fastlm.attention.default, (*tensors, *rest, want_lse, 7))
    output, lse = torch.ops.fastlm.attention(*tensors, *rest, want_lse, 7)
    grads = torch.randn_like(output), torch.randn_like(lse) if want_lse else None
    wanted = [True] * 3 + [t is not None and t.requires_grad for t in (o.mask, o.alibi_slopes, o.sinks)]
    plain = [t.detach() if isinstance(t, Tensor) else t for t in (*tensors, output, lse, *rest)]
    torch.library.opcheck(torch.ops.fastlm.attention_backward.default, (*grads, wanted, *plain))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_kernel_is_chosen_when_it_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Kernel | None] = []

    def note(*args: Any, **kwargs: Any) -> Kernel | None:
        chosen.append(kernel_for(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(attention_traced, "kernel_for", note)
    compare("causal", backend)
    assert [kernel is None for kernel in chosen] == [backend == "torch"] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    tensors = [t.detach().to(dtype).requires_grad_() for t in _dense()]
    compiled = torch.compile(ops.attention_lse, fullgraph=True, backend="aot_eager")
    (fast, lse), (plain, same) = compiled(*tensors), ops.attention_lse(*tensors)
    torch.testing.assert_close((fast, lse), (plain, same))
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_uses_one_draw_for_forward_and_backward(softcap: float | None) -> None:
    query, key, value = _leaf(1, 2, 8, 4), _leaf(1, 2, 8, 4), _leaf(1, 2, 8, 4)

    def attend(value: Tensor) -> Tensor:
        return ops.attention(query, key, value, dropout_p=0.5, softcap=softcap)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    output, other = compiled(value), compiled(value)
    assert not torch.equal(output, other)
    upstream = torch.randn_like(output)
    # The output is linear in the values, so <upstream, output> = <gradient, values> exactly if the draws are the same.
    gradient = torch.autograd.grad(output, value, upstream)[0]
    torch.testing.assert_close((upstream * output).sum(), (gradient * value).sum())


@pytest.mark.parametrize("lacks", ["all gradients", "the mask's"])
def test_dropout_is_drawn_once_where_the_kernel_lacks_gradients(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another implementation makes those, by draws of its own: the forward must be that one's too."""

    def drops_otherwise(*_: Any) -> Any:
        raise AssertionError("a kernel without these gradients has run")

    kernel = Kernel(drops_otherwise, drops_otherwise, True)
    monkeypatch.setattr(
        attention_traced,
        "kernel_for",
        lambda *_, gradients: None if gradients and lacks == "all gradients" else kernel,
    )
    query, key, value, mask = _leaf(1, 2, 8, 4), _leaf(1, 2, 8, 4), _leaf(1, 2, 8, 4), _leaf(1, 2, 8, 8)

    def attend(value: Tensor, mask: Tensor) -> Tensor:
        return ops.attention(query, key, value, mask=mask, dropout_p=0.5)

    given = mask if lacks == "the mask's" else mask.detach()
    output = torch.compile(attend, fullgraph=True, backend="aot_eager")(value, given)
    upstream = torch.randn_like(output)
    gradient = torch.autograd.grad(output, value, upstream)[0]
    torch.testing.assert_close((upstream * output).sum(), (gradient * value).sum())


def test_export_has_the_op() -> None:
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return ops.attention(query, key, value, causal=True)

    tensors = [t.detach() for t in _dense()]
    exported = torch.export.export(Attend(), tuple(tensors), dynamic_shapes=None)
    assert "torch.ops.fastlm.attention.default" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*tensors), ops.attention(*tensors, causal=True))
