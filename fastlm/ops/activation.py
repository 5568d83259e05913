"""The elementwise functions between a feed-forward block's projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.kernels.cpu import activation as kernel
from fastlm.ops.checks import describe
from fastlm.ops.library import (
    autograd_by_reference,
    differentiable_once,
    needs_grad,
    opaque_kernel_why_not,
    tracing,
    triton_float_why_not,
    triton_kernel,
)
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import activation as reference

__all__ = ["gelu", "swiglu"]


class _Activation(torch.autograd.Function):
    """Keeps its inputs alone; the backward computes what it needs of the forward again, in the same pass."""

    @staticmethod
    def forward(ctx: Any, function: str, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return kernel.activation(function, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("swiglu" if ctx.function == "silu" else "gelu")
        inputs = ctx.saved_tensors  # read once: under `recompute` that runs the layer again
        grads = kernel.activation_backward(ctx.function, grad_output, *inputs)
        return None, *grads[: len(inputs)]


def _cpu_run(function: str, *inputs: Tensor) -> Tensor:
    if needs_grad(*inputs):
        result: Tensor = _Activation.apply(function, *inputs)
        return result
    return kernel.activation(function, *inputs)


def _cpu_why_not(*inputs: Tensor) -> str | None:
    dtype = torch.bfloat16 if inputs[0].dtype is torch.bfloat16 else torch.float32
    return opaque_kernel_why_not(native.CPU, *inputs, dtypes=(dtype,))


GELU = Op(
    "gelu",
    [
        Implementation("cpu", lambda input: _cpu_run("gelu", input), _cpu_why_not),
        Implementation("triton", triton_kernel("activation", "gelu"), triton_float_why_not),
        Implementation("torch", lambda input: functional.gelu(input, approximate="tanh"), always),
        Implementation("reference", reference.gelu, always),
    ],
)
SWIGLU = Op(
    "swiglu",
    [
        Implementation("cpu", lambda gate, up: _cpu_run("silu", gate, up), _cpu_why_not),
        Implementation("triton", triton_kernel("activation", "swiglu"), triton_float_why_not),
        Implementation("torch", lambda gate, up: functional.silu(gate) * up, always),
        Implementation("reference", reference.swiglu, always),
    ],
)


@torch.library.custom_op("fastlm::gelu", mutates_args=())
def _gelu(input: Tensor) -> Tensor:
    return GELU(input)


@_gelu.register_fake
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input)


@torch.library.custom_op("fastlm::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return SWIGLU(gate, up)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


autograd_by_reference(_gelu, reference.gelu, differentiable=(0,))
autograd_by_reference(_swiglu, reference.swiglu, differentiable=(0, 1))


def gelu(input: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the tanh form of GELU that GPT-2 uses.

    Hendrycks & Gimpel, 2016, https://arxiv.org/abs/1606.08415. On the native kernel an element's result depends on
    nothing but that element: not on its place in the tensor, its size, or the number of threads.

    Args:
        input: any shape and floating dtype.

    Returns:
        Like `input`.

    Raises:
        ValueError: `input` is not floating.
    """
    if not input.is_floating_point():
        raise ValueError(f"gelu: input is {describe(input)}, expected floats")
    return _gelu(input) if tracing() else GELU(input)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with silu(x) = x sigmoid(x), the gated activation of Llama's feed-forward block.

    Shazeer, 2020, https://arxiv.org/abs/2002.05202. Independent of place, size and threads as `gelu`.

    Args:
        gate: any shape and floating dtype.
        up: like `gate`.

    Returns:
        Like `gate`.

    Raises:
        ValueError: `gate` is not floating, or `up` differs in shape or dtype.
    """
    if not gate.is_floating_point() or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: up is {describe(up)}, gate {describe(gate)}; expected floats, both alike")
    return _swiglu(gate, up) if tracing() else SWIGLU(gate, up)
