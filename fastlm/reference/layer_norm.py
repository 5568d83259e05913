"""Layer normalisation (Ba et al., 2016, https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_layer_norm", "layer_norm"]


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, in float32 or wider."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(input.dtype)


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of input + residual, and that sum, in the wider of their dtypes."""
    total = input + residual
    return layer_norm(total, weight, bias, eps), total
