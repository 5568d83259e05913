"""How far two models' predictions are apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_kl"]


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(reference || logits) in nats, for logits [..., V], in float64."""
    assert reference.shape == logits.shape
    p = reference.double().log_softmax(-1)
    q = logits.double().log_softmax(-1)
    assert bool(torch.isfinite(q).all())
    return float((p.exp() * (p - q)).sum(-1).mean())
