"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), and AdamW for what it is not meant for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlm.training.adamw import clip_and_update

__all__ = ["Muon", "orthogonalize"]

# The quintic a X + b (X X^T) X + c (X X^T)^2 X whose slope at 0 is steepest while singular values stay near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# An AdamW update's usual root mean square: with it one learning rate serves both kinds of parameters (Liu et al., 2025,
# https://arxiv.org/abs/2502.16982).
_ADAMW_RMS = 0.2


def orthogonalize(matrices: Tensor, *, steps: int = _STEPS, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of `matrices` [..., m, n], by Newton-Schulz iteration.

    With M = U S V^T the result is U S' V^T, whose S' lies between 0.7 and 1.2 wherever S is above about 1/100 of the
    Frobenius norm of M. Computed in `dtype`, returned in that of `matrices`.
    """
    a, b, c = _QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).float()
    x = (x / x.square().sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `muon=True`, AdamW for the others.

    A matrix W [m, n] with gradient G: B <- mu B + (1 - mu) G, O = orthogonalize((1 - mu) G + mu B),
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(m, n)) O. The factor gives O the root mean square of AdamW's updates.

    Args:
        groups: parameter groups, each with "params", and optionally "muon", "lr", "weight_decay", "momentum", "betas"
            and "eps". Parameters of a Muon group are matrices.
        lr, weight_decay, momentum, betas, eps: for groups that do not say.
        dtype: of the iteration: bfloat16 is enough for it, and quicker where hardware multiplies it.

    Raises:
        ValueError: a parameter of a Muon group is not a matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "muon": False})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.dim() != 2:
                    raise ValueError(
                        f"groups: a parameter of shape {list(parameter.shape)}, expected matrices for Muon"
                    )

    norm: Tensor
    """Of all gradients together in the last step, before it clipped them: [], on the parameters' device."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, max_norm: float | None = None
    ) -> float | None:
        """One step, as `torch.optim.Optimizer.step`; the gradients count as scaled down to `max_norm`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        orthogonal = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups if g["muon"]]
        gradients = [p.grad for _, parameters in orthogonal for p in parameters if p.grad is not None]
        plain = [group for group in self.param_groups if not group["muon"]]
        self.norm = clip_and_update(self, plain, gradients, max_norm)
        for group, parameters in orthogonal:
            self._muon(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, mu = float(group["lr"]), group["momentum"]
        # Matrices of one shape, either way round, go through the iteration together.
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            m, n = parameter.shape
            by_shape.setdefault((min(m, n), max(m, n)), []).append(parameter)
        for (_, longer), alike in by_shape.items():
            gradients = [p.grad for p in alike if p.grad is not None]
            moments = [self.state[p]["momentum"] for p in alike]
            torch._foreach_lerp_(moments, gradients, 1 - mu)
            updates = torch._foreach_lerp(gradients, moments, mu)
            wide = [u if u.shape[0] <= u.shape[1] else u.mT for u in updates]
            orthogonal = orthogonalize(torch.stack(wide), dtype=self.dtype).unbind()
            if group["weight_decay"]:
                torch._foreach_mul_(alike, 1 - lr * group["weight_decay"])
            turned = [o if p.shape == o.shape else o.mT for p, o in zip(alike, orthogonal, strict=True)]
            torch._foreach_add_(alike, turned, alpha=-lr * _ADAMW_RMS * longer**0.5)
