"""The loss of logits and its gradient by torch's operations, where no kernel does both in one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["torch_softmax_loss"]


def torch_softmax_loss(
    logits: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [C] of logits [C, V] + bias and, with a factor [C], their gradient p - y times the factor."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = target != ignore_index
    index = torch.where(kept, target, 0)[:, None]
    if bias is not None:
        logits.add_(bias)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    expected = logits.gather(1, index)[:, 0]
    if smoothing:
        # Not lerp: it subtracts, and for a target that cannot be that is infinity from infinity.
        expected = (1 - smoothing) * expected + smoothing * logits.mean(dim=1)
    p = logits.exp_()
    total = p.sum(dim=1)
    losses = torch.where(kept, total.log() - expected, 0.0)
    if factor is not None:
        p.mul_((factor / total)[:, None])
        if smoothing:
            p.sub_((factor * (smoothing / p.shape[1]))[:, None])
        p.scatter_add_(1, index, (factor * (smoothing - 1))[:, None])
    return losses, p
