"""Root-mean-square layer normalisation (Zhang & Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean taken in float32 or wider."""
    x = input if input.dtype == torch.float64 else input.float()
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(input.dtype)


def add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of input + residual, and that sum, in the wider of their dtypes."""
    total = input + residual
    return rms_norm(total, weight, eps), total
