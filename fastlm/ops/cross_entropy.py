"""The language-model head and its loss in one op, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.cross_entropy import softmax_loss
from fastlm.kernels.cpu.matmul import product
from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.library import (
    opaque_kernel_why_not,
    tracing,
    triton_float_why_not,
    triton_kernel,
    triton_why_not,
)
from fastlm.ops.registry import Implementation, Op, always
from fastlm.ops.softmax_loss import torch_softmax_loss
from fastlm.reference import cross_entropy as reference

__all__ = ["cross_entropy"]

_REDUCTIONS = ("none", "mean", "sum")
# Logits held at a time: 64 MiB in float32. Large enough for the matrix products to run at full speed and for the
# accumulation into the weight's gradient, which each chunk reads and writes once, not to matter.
_CHUNK_ELEMENTS = 1 << 24

_Gradients = tuple[Tensor, Tensor, Tensor]  # for hidden, weight and bias; empty where not wanted


_TRITON = triton_kernel("cross_entropy", "softmax_loss")


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk: int,
    factors: Tensor | None,
    wants: list[bool],
    softmax: str,
) -> tuple[Tensor, _Gradients]:
    """Goes over the tokens in chunks. Returns each token's loss, and the gradients of sum(factors * losses).

    With p the softmax and y the smoothed one-hot target, a token's gradient with respect to its logits is
    factor * (p - y). `factors` is [N] and 0 for ignored tokens, or None where no gradient is wanted. `softmax`:
    whose, "cpu" and "triton" being one kernel each.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    want_hidden, want_weight, want_bias = wants if factors is not None else (False, False, False)
    losses = hidden.new_empty(tokens, dtype=wide)
    grad_hidden = hidden.new_empty(hidden.shape if want_hidden else (0,))
    grad_weight = weight.new_zeros(weight.shape if want_weight else (0,), dtype=wide)
    grad_bias = weight.new_zeros(vocabulary if want_bias else 0, dtype=wide)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        h, factor = hidden[part], None if factors is None else factors[part].to(wide)
        options = (bias, target[part], ignore_index, smoothing, factor)
        if softmax == "cpu":
            slopes = product(h, weight.T)
            losses[part] = softmax_loss(slopes, *options)  # and the gradient has taken the logits' place
        elif softmax == "triton":
            rows = h.new_empty(h.shape[0], -(-vocabulary // 64) * 64)  # padded, for aligned rows are read at once
            slopes = torch.mm(h, weight.T, out=rows[:, :vocabulary])
            losses[part] = _TRITON(slopes, *options)
        else:
            losses[part], slopes = torch_softmax_loss(h @ weight.T, *options)
        if factor is None:
            continue
        grad_logits = slopes.to(hidden.dtype)
        tiles = softmax == "cpu"
        if want_hidden:
            product(grad_logits, weight, out=grad_hidden[part], tiles=tiles)
        if want_weight and wide == hidden.dtype:
            product(grad_logits.T, h, out=grad_weight, add=True, tiles=tiles)
        elif want_weight:
            grad_weight.add_(grad_logits.T @ h)
        if want_bias:
            grad_bias.add_(slopes.sum(dim=0, dtype=wide))
    return losses, (grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
    chunk: int,
    wants: list[bool],
    softmax: str,
) -> tuple[Tensor, _Gradients]:
    """The loss; for "mean" and "sum" also its gradients, which the backward then only scales.

    The gradient of "none" depends on the incoming gradient token by token, so it is left to the backward.
    """
    kept = target != ignore_index
    factors = None
    if reduction != "none":
        factors = kept.to(torch.promote_types(hidden.dtype, torch.float32))
        if reduction == "mean":
            factors = factors / kept.sum().clamp(min=1)
    losses, gradients = _sweep(
        hidden, weight, target, bias, ignore_index, smoothing, chunk, factors if any(wants) else None, wants, softmax
    )
    if reduction == "none":
        return losses, gradients
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / kept.sum()  # nan where every token is ignored, as in torch
    return loss, gradients


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk: int,
    wants: list[bool],
    softmax: str,
) -> _Gradients:
    """The gradients of reduction "none" for the incoming gradient [N]."""
    factors = torch.where(target != ignore_index, grad, 0.0)
    return _sweep(hidden, weight, target, bias, ignore_index, smoothing, chunk, factors, wants, softmax)[1]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        smoothing: float,
        reduction: str,
        chunk: int,
        softmax: str,
    ) -> Tensor:
        wants = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        loss, gradients = _forward(
            hidden, weight, target, bias, ignore_index, smoothing, reduction, chunk, wants, softmax
        )
        _save(
            ctx, (hidden, weight, target, bias), gradients, (ignore_index, smoothing, chunk, wants, softmax), reduction
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: the gradients would pass for constants
            raise RuntimeError("cross_entropy has no second derivative; fastlm.backend('reference') has")
        # Where the loss itself is differentiated there is nothing to scale.
        return *_gradients(ctx, grad, _backward, scale=not (ctx.ready and grad.is_cpu and bool(grad == 1))), None


def _save(
    ctx: Any, inputs: Sequence[Any], gradients: Sequence[Tensor], options: tuple[Any, ...], reduction: str
) -> None:
    ctx.options = options
    ctx.ready = reduction != "none"
    ctx.save_for_backward(*(gradients if ctx.ready else inputs))


def _gradients(ctx: Any, grad: Tensor, backward: Any, *, scale: bool = True) -> tuple[Tensor | None, ...]:
    """One entry for each argument of the public op but the last, `wants` or `softmax`."""
    wants = ctx.options[3]
    found = ctx.saved_tensors if ctx.ready else backward(grad, *ctx.saved_tensors, *ctx.options)
    if ctx.ready and scale:
        found = [grad * g for g in found]
    hidden, weight, bias = (g if want else None for g, want in zip(found, wants, strict=True))
    return hidden, weight, None, bias, None, None, None, None


def _cpu_why_not(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *_: Any) -> str | None:
    if weight.shape[0] == 0:
        return "the vocabulary is empty"
    if not target.is_cpu:
        return f"target is on {target.device}"
    dtype = torch.bfloat16 if hidden.dtype is torch.bfloat16 else torch.float32
    return opaque_kernel_why_not(native.CPU, hidden, weight, bias, dtypes=(dtype,))


def _triton_why_not(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *_: Any) -> str | None:
    if weight.shape[0] == 0:
        return "the vocabulary is empty"
    return triton_float_why_not(hidden, weight, bias) or triton_why_not(hidden, target)


def _softmax_for(*args: Any) -> str:
    """Whose softmax a traced call takes."""
    return next((i.name for i in CROSS_ENTROPY.implementations if i.why_not(*args) is None), "torch")


CROSS_ENTROPY = Op(
    "cross_entropy",
    [
        Implementation("cpu", lambda *args: _Chunked.apply(*args, "cpu"), _cpu_why_not),
        Implementation("triton", lambda *args: _Chunked.apply(*args, "triton"), _triton_why_not),
        Implementation("torch", lambda *args: _Chunked.apply(*args, "torch"), always),
        Implementation("reference", reference.cross_entropy, always),
    ],
)


@torch.library.custom_op("fastlm::cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    chunk_size: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    softmax = _softmax_for(hidden, weight, target, bias)
    loss, gradients = _forward(
        hidden, weight, target, bias, ignore_index, label_smoothing, reduction, chunk_size, wants, softmax
    )
    return loss, *gradients


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    chunk_size: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=wide)
    return loss, *_fake_gradients(hidden, weight, [want and reduction != "none" for want in wants])


@torch.library.custom_op("fastlm::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    softmax = _softmax_for(hidden, weight, target, bias)
    return _backward(grad, hidden, weight, target, bias, ignore_index, label_smoothing, chunk_size, wants, softmax)


@_cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, wants)


def _fake_gradients(hidden: Tensor, weight: Tensor, wants: list[bool]) -> _Gradients:
    return (
        hidden.new_empty(hidden.shape if wants[0] else (0,)),
        weight.new_empty(weight.shape if wants[1] else (0,)),
        weight.new_empty((weight.shape[0] if wants[2] else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ignore_index, smoothing, reduction, chunk, wants = inputs[4:]
    _save(ctx, inputs[:4], output[1:], (ignore_index, smoothing, chunk, wants), reduction)


def _traced_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return *_gradients(ctx, grad, _cross_entropy_backward), None


_cross_entropy.register_autograd(_traced_backward, setup_context=_setup_context)


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    chunk_size: int | None,
) -> None:
    expect_shape("cross_entropy", "hidden", hidden, ("N", "d"))
    expect_shape("cross_entropy", "weight", weight, ("V", hidden.shape[1]))
    expect_shape("cross_entropy", "target", target, (hidden.shape[0],))
    if target.dtype != torch.int64:
        raise ValueError(f"cross_entropy: target is {describe(target)}, expected int64")
    if bias is not None:
        expect_shape("cross_entropy", "bias", bias, (weight.shape[0],))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"cross_entropy: {name} is {describe(tensor)}, expected hidden's dtype {hidden.dtype}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"cross_entropy: chunk_size is {chunk_size}, expected at least 1")
    if not tracing() and target.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        wrong = (target != ignore_index) & ((target < 0) | (target >= weight.shape[0]))
        if bool(wrong.any()):
            n = int(wrong.nonzero()[0])
            raise ValueError(
                f"cross_entropy: target[{n}] is {int(target[n])}, expected 0 to {weight.shape[0] - 1}, "
                f"or ignore_index {ignore_index}"
            )


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of softmax(hidden @ weight^T + bias) against target, computed chunk by chunk over the tokens.

    The same numbers as `torch.nn.functional.cross_entropy` on the logits, but the [N, V] logits never exist: with
    "mean" and "sum" the forward computes the gradients as it goes and the backward scales them; with "none" the
    backward computes them from the incoming gradient of each token. Differentiable once: a backward with
    create_graph=True raises RuntimeError.

    Args:
        hidden: [N, d], any floating dtype; the softmax is computed in float32 or wider.
        weight: [V, d], hidden's dtype (under autocast both are cast to its dtype).
        target: int64 [N], 0 <= target < V or `ignore_index`.
        bias: [V] or None.
        ignore_index: tokens with this target count neither in the loss nor in its mean.
        label_smoothing: the target distribution is (1 - s) * one-hot + s / V.
        reduction: "mean" over the tokens that are not ignored (nan where there are none), "sum" or "none".
        chunk_size: tokens at a time; by default as many as make 2^24 logits (64 MiB).

    Returns:
        [] for "mean" and "sum", [N] for "none" (0 for ignored tokens); float32 or wider, for a bfloat16 loss has less
        than three digits.

    Raises:
        ValueError: a shape, dtype or option is not as described; a target is out of range (checked on CPU).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, chunk_size)
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[0]))
    if not tracing():
        return CROSS_ENTROPY(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, chunk_size)
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return _cross_entropy(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, chunk_size, wants)[0]
