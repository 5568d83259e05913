"""Native layer and root-mean-square normalisation: csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["norm", "norm_backward"]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool,
    dtype: torch.dtype = torch.float32,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last dimension of float32 [..., dim].

    Without `centre` the mean that is subtracted is 0. The result is float32 or bfloat16; with `save` comes what
    `norm_backward` needs.
    """
    x = input.contiguous()
    w, b = (None if t is None else t.contiguous() for t in (weight, bias))
    output = torch.empty_like(x, dtype=dtype)
    dim = x.shape[-1]
    rows = x.numel() // dim if dim else 0
    statistics = x.new_empty(rows, 2) if save else None
    native.CPU.require().norm(
        x.data_ptr(),
        _address(w),
        _address(b),
        output.data_ptr(),
        _address(statistics),
        rows,
        dim,
        eps,
        centre,
        dtype is torch.bfloat16,
        native.num_threads(),
    )
    return output, statistics


def norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    *,
    centre: bool,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, the last two where `wants` says so; grad_output is as norm's output."""
    g, x = grad_output.contiguous(), input.contiguous()
    w = None if weight is None else weight.contiguous()
    grad_input = torch.empty_like(x)
    dim = x.shape[-1]
    grad_weight, grad_bias = (x.new_empty(dim) if want else None for want in wants)
    native.CPU.require().norm_backward(
        g.data_ptr(),
        x.data_ptr(),
        _address(w),
        statistics.data_ptr(),
        grad_input.data_ptr(),
        _address(grad_weight),
        _address(grad_bias),
        len(statistics),
        dim,
        centre,
        g.dtype is torch.bfloat16,
        native.num_threads(),
    )
    return grad_input, grad_weight, grad_bias
