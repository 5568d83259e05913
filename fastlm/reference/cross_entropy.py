"""The language-model head and its loss: cross entropy of softmax(hidden @ weight^T + bias)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["cross_entropy"]


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    chunk_size: int,
) -> Tensor:
    """torch's cross_entropy of the whole [N, V] logits, in float32 or wider. `chunk_size` is not used."""
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
