"""Normalisation of a sum: one block of a Transformer adds to the residual stream, the next one normalises it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.layer_norm import LAYER_NORM
from fastlm.ops.library import (
    autograd_by_reference,
    opaque_kernel_why_not,
    tracing,
    triton_float_why_not,
    triton_kernel,
)
from fastlm.ops.norm import cpu_add_norm
from fastlm.ops.registry import Implementation, Op, always
from fastlm.ops.rms_norm import RMS_NORM
from fastlm.reference import layer_norm as layer_norm_reference
from fastlm.reference import rms_norm as rms_norm_reference

__all__ = ["add_layer_norm", "add_rms_norm"]


def _cpu_rms(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return cpu_add_norm(input, residual, weight, None, eps, centre=False)


def _cpu_layer(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return cpu_add_norm(input, residual, weight, bias, eps, centre=True)


def _cpu_why_not(input: Tensor, residual: Tensor, *rest: Any) -> str | None:
    return opaque_kernel_why_not(native.CPU, input, dtypes=(torch.float32, torch.bfloat16)) or opaque_kernel_why_not(
        native.CPU, residual, *rest[:-1]
    )


def _triton_why_not(input: Tensor, residual: Tensor, *rest: Any) -> str | None:
    if input.shape[-1] > 8192:
        return f"rows of {input.shape[-1]} features, the kernel takes up to 8192"
    return triton_float_why_not(input, residual, *rest[:-1])


def _op(name: str, cpu: Any, norm: Op, formula: Any) -> Op:
    def add_then_norm(input: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = input + residual
        return norm(total, *rest), total

    return Op(
        name,
        [
            Implementation("cpu", cpu, _cpu_why_not),
            Implementation("triton", triton_kernel("norm", name), _triton_why_not),
            Implementation("torch", add_then_norm, always),
            Implementation("reference", formula, always),
        ],
    )


ADD_RMS_NORM = _op("add_rms_norm", _cpu_rms, RMS_NORM, rms_norm_reference.add_rms_norm)
ADD_LAYER_NORM = _op("add_layer_norm", _cpu_layer, LAYER_NORM, layer_norm_reference.add_layer_norm)


@torch.library.custom_op("fastlm::add_rms_norm", mutates_args=())
def _add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    output, total = ADD_RMS_NORM(input, residual, weight, eps)
    return output.contiguous(), total.contiguous()


@torch.library.custom_op("fastlm::add_layer_norm", mutates_args=())
def _add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    output, total = ADD_LAYER_NORM(input, residual, weight, bias, eps)
    return output.contiguous(), total.contiguous()


def _fake(input: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.new_empty(input.shape, dtype=dtype), input.new_empty(input.shape, dtype=dtype)


_add_rms_norm.register_fake(_fake)
_add_layer_norm.register_fake(_fake)
autograd_by_reference(_add_rms_norm, rms_norm_reference.add_rms_norm, differentiable=(0, 1, 2))
autograd_by_reference(_add_layer_norm, ADD_LAYER_NORM, differentiable=(0, 1, 2, 3))


def _check(op: str, input: Tensor, residual: Tensor, **parameters: Tensor | None) -> None:
    if residual.shape != input.shape:
        raise ValueError(f"{op}: residual is {describe(residual)}, expected shape {list(input.shape)}")
    for name, parameter in parameters.items():
        if parameter is not None:
            expect_shape(op, name, parameter, (input.shape[-1],))


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of input + residual, and that sum: one pass over memory, forward and backward, for two.

    The same bits as of an addition and a norm of its result.

    Args:
        input: [..., dim], any floating dtype: what a block of a Transformer gives.
        residual: like input; another floating dtype will do, and the sum has the wider one.
        weight: [dim] or None.
        eps: added to the mean square.

    Returns:
        The normalised sum and the sum.

    Raises:
        ValueError: a shape is not as described.
    """
    _check("add_rms_norm", input, residual, weight=weight)
    run = _add_rms_norm if tracing() else ADD_RMS_NORM
    result: tuple[Tensor, Tensor] = run(input, residual, weight, eps)
    return result


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of input + residual, and that sum, as in `add_rms_norm`; bias [dim] or None.

    Raises:
        ValueError: a shape is not as described there.
    """
    _check("add_layer_norm", input, residual, weight=weight, bias=bias)
    run = _add_layer_norm if tracing() else ADD_LAYER_NORM
    result: tuple[Tensor, Tensor] = run(input, residual, weight, bias, eps)
    return result
