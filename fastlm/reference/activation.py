"""The elementwise functions of feed-forward blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gelu", "swiglu"]


def gelu(input: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GELU's tanh form (Hendrycks & Gimpel, 2016)."""
    x = input if input.dtype == torch.float64 else input.float()
    return (0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).to(input.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up (Shazeer, 2020)."""
    g = gate if gate.dtype == torch.float64 else gate.float()
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)
