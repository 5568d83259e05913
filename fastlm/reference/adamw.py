"""A step of AdamW with clipped gradients, in the notation of Loshchilov & Hutter, 2019
(https://arxiv.org/abs/1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adamw", "clip_factor"]


def clip_factor(gradients: Sequence[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor | float]:
    """The norm of all gradients together, and what they are to be multiplied with."""
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    return norm, 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    *,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter p, mean of gradients m and of squares v after step t (from 1) with the clipped gradient g."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v
