"""y = x W^T + b with dense or block-quantised weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.library import autograd_by_reference, tracing
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import linear as reference

__all__ = ["linear"]

COMPUTE = ("fast", "exact")


def _torch_run(input: Tensor, weight: Tensor, bias: Tensor | None, compute: str) -> Tensor:
    return functional.linear(input, weight, bias)


def _torch_why_not(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> str | None:
    if isinstance(weight, QuantizedTensor):
        return f"weight is {weight.kind}"
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        return f"weight is {weight.dtype}, input {input.dtype}"
    return None


def _reference_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return reference.quantized_linear(input, weight.data, weight.kind, bias, compute)
    return reference.linear(input, weight, bias)


LINEAR = Op(
    "linear",
    [
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", _reference_run, always),
    ],
)


@torch.library.custom_op("fastlm::linear", mutates_args=())
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return LINEAR(input, weight, bias, "exact").clone()


@_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


autograd_by_reference(_linear, reference.linear, differentiable=(0, 1, 2))


@torch.library.custom_op("fastlm::quantized_linear", mutates_args=())
def _quantized_linear(
    input: Tensor, data: Tensor, kind: str, columns: int, bias: Tensor | None, compute: str
) -> Tensor:
    weight = QuantizedTensor(data, kind, (data.shape[0], columns))
    return LINEAR(input, weight, bias, compute).clone()


@_quantized_linear.register_fake
def _(input: Tensor, data: Tensor, kind: str, columns: int, bias: Tensor | None, compute: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], data.shape[0])


def _quantized_reference(
    input: Tensor, data: Tensor, kind: str, columns: int, bias: Tensor | None, compute: str
) -> Tensor:
    return reference.quantized_linear(input, data, kind, bias, compute)


autograd_by_reference(_quantized_linear, _quantized_reference, differentiable=(0, 4))


def linear(
    input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, *, compute: str = "fast"
) -> Tensor:
    """y = x W^T + b over the last dimension.

    Gradients flow to `input` and `bias`, and to a dense `weight`; a quantised weight is frozen.

    Args:
        input: [..., K], any floating dtype.
        weight: [N, K], dense or quantised. Its dtype may differ from the input's.
        bias: [N] or None.
        compute: for the Q kinds. "exact" multiplies the input with the dequantised weights and sums in float32.
            "fast" may round the input to int8 by blocks of 32, where integer products pay
            (`fastlm.reference.linear.quantize_activations`).

    Returns:
        [..., N] in the input's dtype.

    Raises:
        ValueError: a shape does not fit, the input is not floating, or `compute` is unknown.
    """
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1] or not input.is_floating_point():
        raise ValueError(
            f"linear: input is {describe(input)}, expected floats [..., {weight.shape[-1]}] "
            f"for a weight of {list(weight.shape)}"
        )
    if bias is not None:
        expect_shape("linear", "bias", bias, (weight.shape[0],))
    if compute not in COMPUTE:
        raise ValueError(f"linear: compute is {compute!r}, expected 'fast' or 'exact'")
    if tracing():
        if isinstance(weight, QuantizedTensor):
            return _quantized_linear(input, weight.data, weight.kind, weight.shape[1], bias, compute)
        return _linear(input, weight, bias)
    return LINEAR(input, weight, bias, compute)
