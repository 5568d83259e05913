"""Root-mean-square layer normalisation."""

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
from fastlm.reference import rms_norm as reference

__all__ = ["rms_norm"]


def _cpu_run(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return cpu_norm(input, weight, None, eps, centre=False)


def _cpu_why_not(input: Tensor, weight: Tensor | None, eps: float) -> str | None:
    return opaque_kernel_why_not(native.CPU, input, weight)


def _triton_why_not(input: Tensor, weight: Tensor | None, eps: float) -> str | None:
    if input.shape[-1] > 8192:
        return f"rows of {input.shape[-1]} features, the kernel takes up to 8192"
    return triton_float_why_not(input, weight)


def _torch_run(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return functional.rms_norm(input, input.shape[-1:], weight, eps)


def _torch_why_not(input: Tensor, weight: Tensor | None, eps: float) -> str | None:
    if weight is not None and weight.dtype != input.dtype:
        return f"weight is {weight.dtype}, input {input.dtype}"
    return None


RMS_NORM = Op(
    "rms_norm",
    [
        Implementation("cpu", _cpu_run, _cpu_why_not),
        Implementation("triton", triton_kernel("norm", "rms_norm"), _triton_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", reference.rms_norm, always),
    ],
)


@torch.library.custom_op("fastlm::rms_norm", mutates_args=())
def _rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return RMS_NORM(input, weight, eps).contiguous()


@_rms_norm.register_fake
def _(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return input.new_empty(input.shape)


autograd_by_reference(_rms_norm, reference.rms_norm, differentiable=(0, 1))


def rms_norm(input: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Zhang & Sennrich, 2019, https://arxiv.org/abs/1910.07467. The mean is taken in float32 (float64 for float64).
    On the native kernel a row's result depends on that row alone, not on its place, their number, or the threads.

    Args:
        input: [..., dim], any floating dtype.
        weight: [dim] or None.
        eps: added to the mean square.

    Returns:
        Like `input`.

    Raises:
        ValueError: `weight` does not have the shape [dim].
    """
    if weight is not None:
        expect_shape("rms_norm", "weight", weight, (input.shape[-1],))
    if tracing():
        return _rms_norm(input, weight, eps)
    return RMS_NORM(input, weight, eps)
