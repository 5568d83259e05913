"""Native layer and root-mean-square normalisation: csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["norm", "norm_backward"]


def norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool,
    dtype: torch.dtype = torch.float32,
    save: bool = False,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last dimension of float32 [..., dim].

    Without `centre` the mean that is subtracted is 0. x is the input, or its sum with `added`, float32 or bfloat16,
    which then is returned too.

    Returns:
        The result, float32 or bfloat16; with `save` what `norm_backward` needs; the sum.
    """
    x = input.contiguous()
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = x.new_empty(x.shape, dtype=dtype)
    total = None
    if added is not None:
        added, total = added.contiguous(), x.new_empty(x.shape)
    dim = x.shape[-1]
    rows = x.numel() // dim if dim else 0
    statistics = x.new_empty(rows, 2) if save else None
    native.CPU.require().norm(
        x.data_ptr(),
        native.address(w),
        native.address(b),
        output.data_ptr(),
        native.address(statistics),
        rows,
        dim,
        eps,
        centre,
        dtype is torch.bfloat16,
        native.num_threads(),
        native.address(added),
        native.address(total),
        added is not None and added.dtype is torch.bfloat16,
    )
    return output, statistics, total


def norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    *,
    centre: bool,
    wants: tuple[bool, bool],
    grad_total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, the last two where `wants` says so; grad_output is as norm's output.

    Where something was added, `input` is the sum, `grad_total` its gradient from elsewhere, float32, and the first
    result the gradient of either summand.
    """
    grad_total = None if grad_total is None else grad_total.contiguous()
    g, x = grad_output.contiguous(), input.contiguous()
    w = None if weight is None else weight.contiguous()
    grad_input = torch.empty_like(x)
    dim = x.shape[-1]
    grad_weight, grad_bias = (x.new_empty(dim) if want else None for want in wants)
    native.CPU.require().norm_backward(
        g.data_ptr(),
        x.data_ptr(),
        native.address(w),
        statistics.data_ptr(),
        grad_input.data_ptr(),
        native.address(grad_weight),
        native.address(grad_bias),
        len(statistics),
        dim,
        centre,
        g.dtype is torch.bfloat16,
        native.num_threads(),
        native.address(grad_total),
    )
    return grad_input, grad_weight, grad_bias
