"""The native AdamW step: csrc/cpu/adamw.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["AdamWTensors", "adamw", "fits"]


class AdamWTensors(NamedTuple):
    """A parameter, its gradient, and its state; of a parameter that is only clipped, the gradient."""

    parameter: Tensor | None
    gradient: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    steps: Tensor | None = None


def fits(tensors: AdamWTensors) -> bool:
    """Whether the kernel can take these: contiguous float32 on the CPU."""
    return all(
        t is None or (t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and t.is_contiguous())
        for t in tensors
    )


def adamw(
    groups: Sequence[tuple[Sequence[AdamWTensors], tuple[float, float, float, float, float]]], max_norm: float | None
) -> float:
    """One step; the norm of all gradients as it was.

    Each group has its learning rate, weight decay, beta1, beta2 and epsilon. Everything `fits`.
    """
    every = [tensors for group, _ in groups for tensors in group]
    norm: float = native.CPU.require().adamw(
        [tuple(native.address(t) for t in tensors) for tensors in every],
        [tensors.gradient.numel() for tensors in every],
        [(len(group), options) for group, options in groups],
        math.inf if max_norm is None else max_norm,
        native.num_threads(),
    )
    # Autograd and whatever keeps a copy of a weight go by versions, and torch has seen none of this.
    torch.autograd.graph.increment_version([t for tensors in every for t in tensors if t is not None])
    return norm
