"""ops.cross_entropy: the chunked loss and its gradients against torch's loss of the whole logits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu.cross_entropy import softmax_loss

needs_native = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")
Loss = Callable[..., Tensor]
REDUCTIONS = ["none", "mean", "sum"]


def _case(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """hidden, weight and bias that want gradients; targets, about one in four of them -100."""
    shapes = ((tokens, dim), (vocabulary, dim), (vocabulary,))
    target = torch.randint(vocabulary, (tokens,)).masked_fill_(torch.rand(tokens) < 0.25, -100)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes], target


def _plain(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, chunk_size: int = 0, **options: Any
) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), target, **options)


def compare(loss: Loss, tensors: list[Tensor], target: Tensor, **options: Any) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    hidden, weight, bias = tensors
    expected = _plain(hidden, weight, target, bias=bias, **options)
    got = loss(hidden, weight, target, bias=bias, **options)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    for fast, slow in zip(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_combination_of_options(backend: str, reduction: str) -> None:
    for smoothing, chunk, with_bias, ignore in itertools.product([0.0, 0.2, 1.0], [1, 7, 20, 99], [0, 1], [-100, 3]):
        tensors, target = _case(20, 5, 11)
        if ignore == 3:
            target = target.clamp(min=0)
        if not with_bias:
            tensors[2] = None  # type: ignore[call-overload]
        with ops.backend(backend):
            compare(
                ops.cross_entropy,
                tensors,
                target,
                reduction=reduction,
                label_smoothing=smoothing,
                ignore_index=ignore,
                chunk_size=chunk,
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_gradients_that_are_wanted(reduction: str) -> None:
    for wants in itertools.product([False, True], repeat=3):
        if any(wants):
            tensors, target = _case(20, 5, 11)
            for tensor, want in zip(tensors, wants, strict=True):
                tensor.requires_grad_(want)
            compare(ops.cross_entropy, tensors, target, reduction=reduction, chunk_size=6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    tensors, target = _case(6, 3, 5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.cross_entropy(h, w, target, bias=b, reduction=reduction, label_smoothing=0.1, chunk_size=4),
        tensors,
    )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    dim=st.integers(1, 20),
    vocabulary=st.integers(1, 50),
    chunk=st.integers(1, 50),
    strided=st.booleans(),
)
def test_any_shape_and_stride(tokens: int, dim: int, vocabulary: int, chunk: int, strided: bool) -> None:
    tensors, target = _case(tokens, dim, vocabulary)
    if strided:
        tensors = [t.detach().T.contiguous().T.requires_grad_() for t in tensors[:2]] + tensors[2:]
        target = torch.stack((target, target), dim=1)[:, 1]
    compare(ops.cross_entropy, tensors, target, reduction="sum", chunk_size=chunk)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_as_accurate_as_torch_in_the_same_dtype(backend: str, dtype: torch.dtype, reduction: str) -> None:
    if backend == "cpu" and (dtype is torch.float16 or native.CPU.module is None):
        pytest.skip("the native kernel takes float32 and bfloat16")
    tensors, target = _case(60, 16, 300, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found = []
    for inputs, loss in ((tensors, ops.cross_entropy), (tensors, _plain), (wide, _plain)):
        with ops.backend(backend):
            value = loss(inputs[0], inputs[1], target, bias=inputs[2], reduction=reduction, chunk_size=13)
        found.append([value.detach(), *torch.autograd.grad(value.sum(), inputs)])
    assert [t.dtype for t in found[0]] == [torch.float32, dtype, dtype, dtype]
    for fast, same, exact in zip(*found, strict=True):
        assert_close_to_reference(fast, same, exact)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_cannot_be_costs_infinitely(backend: str, smoothing: float) -> None:
    hidden, weight = torch.ones(2, 4), torch.zeros(3, 4)
    bias, target = torch.tensor([0.0, -torch.inf, 0.0]), torch.tensor([1, 1])
    with ops.backend(backend):
        loss = ops.cross_entropy(hidden, weight, target, bias=bias, label_smoothing=smoothing, reduction="none")
    assert loss.tolist() == [torch.inf, torch.inf]


def _native_pair(
    smoothing: float, with_bias: bool, vocabulary: int, dtype: torch.dtype, ignore: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Losses and gradients of each token's loss by the native kernel, and by torch in the same dtype and in float64."""
    tensors, target = _case(20, 5, vocabulary, dtype)
    if ignore >= 0:
        target = target.clamp(min=0)
    leaves = tensors[: 2 + with_bias]
    wide = [t.detach().double() for t in leaves]
    upstream, found = torch.randn(20, dtype=torch.float64), []
    for inputs, loss in ((leaves, ops.cross_entropy), (leaves, _plain), (wide, _plain)):
        inputs = [t.detach().requires_grad_() for t in inputs]
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing, "ignore_index": ignore}
        value = loss(inputs[0], inputs[1], target, bias=inputs[2] if with_bias else None, chunk_size=7, **options)
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        found.append([value.detach(), *torch.autograd.grad(value, inputs, upstream.to(value.dtype))])
    return found[0], found[1], found[2]


def _hold(found: tuple[list[Tensor], list[Tensor], list[Tensor]], dtype: torch.dtype) -> None:
    # A narrow gradient of the head is summed over chunks, each rounded: torch rounds once.
    floor = 2e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for fast, same, exact in zip(*found, strict=True):
        assert_close_to_reference(fast, same, exact, floor=floor)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    with_bias=st.booleans(),
    vocabulary=st.integers(2, 70),  # of one word every gradient is 0, to which no bound is relative
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ignore=st.sampled_from([-100, 0]),
)
def test_the_native_kernel(smoothing: float, with_bias: bool, vocabulary: int, dtype: torch.dtype, ignore: int) -> None:
    with ops.backend("cpu"):
        _hold(_native_pair(smoothing, with_bias, vocabulary, dtype, ignore), dtype)


@needs_native
@pytest.mark.parametrize("fault", ["bias", "smoothing", "factors", "ignored", "gradient"])
def test_faults_planted_before_the_native_kernel_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastlm.ops.cross_entropy"]
    kernel = module.softmax_loss

    def wrong(logits: Tensor, bias: Any, target: Tensor, ignore: int, smoothing: float, factors: Any) -> Tensor:
        bias = None if fault == "bias" else bias
        smoothing = 0.0 if fault == "smoothing" else smoothing
        target = target.clamp(min=0) if fault == "ignored" else target
        factors = torch.ones_like(factors) if fault == "factors" and factors is not None else factors
        before = logits.clone()
        losses: Tensor = kernel(logits, bias, target, ignore, smoothing, factors)
        if fault == "gradient":
            logits.copy_(before)
        return losses

    _hold(_native_pair(0.2, True, 33, torch.float32, -100), torch.float32)
    monkeypatch.setattr(module, "softmax_loss", wrong)
    with pytest.raises(AssertionError):
        _hold(_native_pair(0.2, True, 33, torch.float32, -100), torch.float32)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_native_kernel_depends_on_itself_alone(dtype: torch.dtype, isa: str) -> None:
    logits, target, factors = torch.randn(300, 77).to(dtype), torch.randint(77, (300,)), torch.rand(300)
    whole = logits.clone()
    losses = softmax_loss(whole, None, target, -100, 0.1, factors)
    threads = torch.get_num_threads()
    try:
        for count, rows in ((1, slice(0, 300)), (3, slice(0, 300)), (1, slice(17, 18)), (3, slice(5, 290))):
            torch.set_num_threads(count)
            part = logits[rows].clone()
            assert torch.equal(softmax_loss(part, None, target[rows], -100, 0.1, factors[rows]), losses[rows])
            assert torch.equal(part, whole[rows])
    finally:
        torch.set_num_threads(threads)
    logits[3] = torch.nan  # a token that does not count leaves no trace
    target[3] = -100
    assert softmax_loss(logits, None, target, -100, 0.1, factors).isfinite().all() and logits.isfinite().all()
    with pytest.raises(IndexError, match="target 77 is not in"):
        softmax_loss(logits, None, target.fill_(77), -100, 0.0, None)


def test_logits_of_a_thousand_do_not_overflow_or_cancel() -> None:
    tensors, target = _case(30, 8, 40, torch.float32)
    big = [(t.detach() * 30).requires_grad_() for t in tensors[:2]]
    wide = [t.detach().double() for t in big]
    losses = ops.cross_entropy(*big, target, reduction="none")
    assert_close_to_reference(
        losses, _plain(*big, target, reduction="none"), _plain(*wide, target, reduction="none"), floor=1e-7
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_tokens_ignored(smoothing: float) -> None:
    tensors, target = _case(5, 3, 4)
    target.fill_(-100)
    for reduction in REDUCTIONS:
        losses = [
            f(tensors[0], tensors[1], target, bias=tensors[2], reduction=reduction, label_smoothing=smoothing)
            for f in (ops.cross_entropy, _plain)
        ]
        torch.testing.assert_close(*losses, equal_nan=True)  # the mean of nothing is nan, as in torch
        gradients = [torch.autograd.grad(loss.sum(), tensors) for loss in losses]
        for fast, slow in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, slow)


def test_weight_tied_to_the_embedding() -> None:
    ids, target = torch.randint(11, (20,)), torch.randint(11, (20,))
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    gradients = [
        torch.autograd.grad(loss(weight[ids].tanh(), weight, target), weight)[0] for loss in (ops.cross_entropy, _plain)
    ]
    torch.testing.assert_close(*gradients)


class _Largest(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_logits_never_exist_as_a_whole(reduction: str) -> None:
    tokens, dim, vocabulary, chunk = 600, 4, 500, 50
    tensors, target = _case(tokens, dim, vocabulary, torch.float32)
    sizes = {}
    for loss in (ops.cross_entropy, _plain):
        with _Largest() as largest:
            loss(*tensors[:2], target, bias=tensors[2], reduction=reduction, chunk_size=chunk).sum().backward()
        sizes[loss] = largest.elements
    assert sizes[ops.cross_entropy] == chunk * vocabulary
    assert sizes[_plain] == tokens * vocabulary  # the measurement sees what it is to see


def test_default_chunk_is_bounded() -> None:
    tensors, target = _case(2000, 2, 20000, torch.float32)
    with _Largest() as largest, torch.no_grad():
        ops.cross_entropy(*tensors[:2], target)
    assert 2**23 < largest.elements <= 2**24


def _gradient_of_none_as_if_uniform(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    losses = ops.cross_entropy(hidden, weight, target, **options)
    total = losses.sum()
    return losses.detach() + (total - total.detach()) / losses.numel()


FAULTS: dict[str, Loss] = {
    "zeros": lambda h, w, t, **o: ops.cross_entropy(h, w, t, **o) * 0,
    "incoming gradients averaged": _gradient_of_none_as_if_uniform,
    "ignored tokens counted": lambda h, w, t, **o: ops.cross_entropy(h, w, t.clamp(min=0), **o),
    "smoothing left out": lambda h, w, t, **o: ops.cross_entropy(h, w, t, **{**o, "label_smoothing": 0.0}),
    "bias left out": lambda h, w, t, **o: ops.cross_entropy(h, w, t, **{**o, "bias": o["bias"] * 0}),
    "weight's gradient from the last chunk only": lambda h, w, t, **o: torch.cat(
        [
            ops.cross_entropy(h[:14], w.detach(), t[:14], **o),
            ops.cross_entropy(h[14:], w, t[14:], **o),
        ]
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    tensors, target = _case(20, 5, 11)
    options = {"reduction": "none", "label_smoothing": 0.1, "chunk_size": 7}
    compare(ops.cross_entropy, tensors, target, **options)
    with pytest.raises(AssertionError):
        compare(FAULTS[fault], tensors, target, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_through_one_graph_and_no_second_derivative(reduction: str) -> None:
    tensors, target = _case(6, 3, 5)
    loss = ops.cross_entropy(*tensors[:2], target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, tensors[0], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, tensors[0], retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match=r"no second derivative; fastlm.backend\('reference'\) has"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)
    with ops.backend("reference"):
        loss = ops.cross_entropy(*tensors[:2], target, reduction=reduction).sum()
        assert torch.autograd.grad(loss, tensors[0], create_graph=True)[0].requires_grad


def test_autocast_computes_the_logits_in_its_dtype() -> None:
    tensors, target = _case(20, 5, 11, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.cross_entropy(*tensors[:2], target, bias=tensors[2])
        expected = ops.cross_entropy(*(t.bfloat16() for t in tensors[:2]), target, bias=tensors[2].bfloat16())
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, tensors)
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = torch.autograd.grad(_plain(*tensors[:2], target, bias=tensors[2]), tensors)
    for got, want in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(reduction: str) -> None:
    tensors, target = _case(10, 4, 6, torch.float32)
    hidden, weight, bias = tensors
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy.default,
        (hidden, weight, target, bias, -100, 0.1, reduction, 4, [True, True, True]),
    )
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy.default,
        (hidden, weight.detach(), target, None, -100, 0.0, reduction, 4, [True, False, False]),
    )
    grad = torch.randn(10)
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy_backward.default,
        (grad, hidden.detach(), weight.detach(), target, bias.detach(), -100, 0.1, 4, [True, False, True]),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_in_one_graph(reduction: str) -> None:
    tensors, target = _case(20, 5, 11)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        return ops.cross_entropy(hidden * 1.0, weight, target, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compare(compiled, tensors, target, reduction=reduction, label_smoothing=0.1, chunk_size=7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors[:2], target), _plain(*tensors[:2], target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(2, 3, 4)}, r"hidden is .*expected shape \[N, d\]"),
        ({"weight": torch.randn(5, 3)}, r"weight is .*expected shape \[V, 4\]"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target is .*expected shape \[3\]"),
        ({"target": torch.zeros(3)}, "target is float32 .*expected int64"),
        ({"target": torch.tensor([0, 5, 1])}, r"target\[1\] is 5, expected 0 to 4, or ignore_index -100"),
        ({"target": torch.tensor([0, 1, -1])}, r"target\[2\] is -1"),
        ({"bias": torch.randn(4)}, r"bias is .*expected shape \[5\]"),
        ({"weight": torch.randn(5, 4).double()}, "weight is float64 .*expected hidden's dtype torch.float32"),
        ({"reduction": "avg"}, "reduction is 'avg', expected one of none, mean, sum"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    call = {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "target": torch.tensor([0, 4, -100])}
    assert ops.cross_entropy(**call).isfinite()
    with pytest.raises(ValueError, match=r"^cross_entropy: " + message):
        ops.cross_entropy(**{**call, **change})
