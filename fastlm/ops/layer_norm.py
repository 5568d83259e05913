"""Layer normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.ops.checks import expect_shape
from fastlm.ops.library import (
    autograd_by_reference,
    opaque_kernel_why_not,
    tracing,
    triton_float_why_not,
    triton_kernel,
)
from fastlm.ops.norm import cpu_norm
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import layer_norm as reference

__all__ = ["layer_norm"]


def _cpu_run(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return cpu_norm(input, weight, bias, eps, centre=True)


def _cpu_why_not(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return opaque_kernel_why_not(native.CPU, input, weight, bias)


def _triton_why_not(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    if input.shape[-1] > 8192:
        return f"rows of {input.shape[-1]} features, the kernel takes up to 8192"
    return triton_float_why_not(input, weight, bias)


def _torch_run(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(input, input.shape[-1:], weight, bias, eps)


def _torch_why_not(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            return f"{name} is {tensor.dtype}, input {input.dtype}"
    return None


LAYER_NORM = Op(
    "layer_norm",
    [
        Implementation("cpu", _cpu_run, _cpu_why_not),
        Implementation("triton", triton_kernel("norm", "layer_norm"), _triton_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", reference.layer_norm, always),
    ],
)


@torch.library.custom_op("fastlm::layer_norm", mutates_args=())
def _layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return LAYER_NORM(input, weight, bias, eps).contiguous()


@_layer_norm.register_fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return input.new_empty(input.shape)


autograd_by_reference(_layer_norm, LAYER_NORM, differentiable=(0, 1, 2))


def layer_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    Ba et al., 2016, https://arxiv.org/abs/1607.06450. Mean and (biased) variance are taken in float32 (float64 for
    float64).

    Args:
        input: [..., dim], any floating dtype.
        weight: [dim] or None.
        bias: [dim] or None.
        eps: added to the variance.

    Returns:
        Like `input`.

    Raises:
        ValueError: `weight` or `bias` does not have the shape [dim].
    """
    if weight is not None:
        expect_shape("layer_norm", "weight", weight, (input.shape[-1],))
    if bias is not None:
        expect_shape("layer_norm", "bias", bias, (input.shape[-1],))
    if tracing():
        return _layer_norm(input, weight, bias, eps)
    return LAYER_NORM(input, weight, bias, eps)
