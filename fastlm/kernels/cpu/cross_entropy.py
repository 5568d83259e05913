"""The native loss of logits: csrc/cpu/softmax_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["softmax_loss"]


def softmax_loss(
    logits: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, factors: Tensor | None
) -> Tensor:
    """Losses, float32 [C], of contiguous logits [C, V] + bias [V], float32 or bfloat16; 0 where target [C] is to be
    ignored. With factors [C], float32, `logits` becomes the gradient of sum(factors * losses) with respect to itself.

    Raises IndexError for a target outside [0, V).
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    b = None if bias is None else bias.float().contiguous()
    t, f = target.contiguous(), None if factors is None else factors.contiguous()
    native.CPU.require().softmax_loss(
        logits.data_ptr(),
        native.address(b),
        t.data_ptr(),
        native.address(f),
        losses.data_ptr(),
        *logits.shape,
        ignore_index,
        smoothing,
        logits.dtype is torch.bfloat16,
        native.num_threads(),
    )
    return losses
