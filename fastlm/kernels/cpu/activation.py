"""Native activations: csrc/cpu/activation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["activation"]

_CODES = {"silu": 0, "gelu": 1}


def activation(function: str, input: Tensor, factor: Tensor | None = None) -> Tensor:
    """f(input) * factor, elementwise; `function` is "silu" or "gelu" (the tanh form)."""
    x = input.contiguous()
    u = None if factor is None else factor.contiguous()
    output = torch.empty_like(x)
    native.CPU.require().activation(
        x.data_ptr(),
        0 if u is None else u.data_ptr(),
        output.data_ptr(),
        x.numel(),
        _CODES[function],
        native.num_threads(),
    )
    return output
