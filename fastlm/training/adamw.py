"""AdamW whose step on a CPU is one native call, clipping included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from fastlm.kernels import native
from fastlm.kernels.cpu.adamw import AdamWTensors, adamw, fits

__all__ = ["AdamW", "clip_and_update"]


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), with clipping.

    Groups, state and state_dict are torch's: what one has saved the other goes on with. float32 parameters on a CPU are
    clipped and updated together in one native call, whose result depends on neither the number of threads nor where
    tensors lie; others by torch's fused kernel.

    Args:
        params, lr, betas, eps, weight_decay: as torch's.
    """

    norm: Tensor
    """Of all gradients together in the last step, before it clipped them: [], on the parameters' device."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, max_norm: float | None = None
    ) -> float | None:
        """One step, as torch's.

        Args:
            closure: as torch's.
            max_norm: the gradients count as scaled down to this norm; on a CPU `.grad` itself stays as it is.

        Raises:
            ValueError: `max_norm` is not positive, or the state that was loaded is of an option this has not.
        """
        for name in ("amsgrad", "maximize"):
            if any(group[name] for group in self.param_groups):
                raise ValueError(f"{name}: True in a parameter group, expected False")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}  # set by GradScaler
        self.norm = clip_and_update(self, self.param_groups, (), max_norm, **scaling)
        return loss


def clip_and_update(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[dict[str, Any]],
    others: Sequence[Tensor],
    max_norm: float | None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Clips the gradients of `groups` and the gradients `others`, these in place, and takes a step of AdamW with the
    groups' parameters, keeping their state in `optimizer`. Returns the norm before, []."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: {max_norm}, expected a positive number or None")
    members = [[_tensors(optimizer, p) for p in group["params"] if p.grad is not None] for group in groups]
    every = [*(AdamWTensors(None, gradient) for gradient in others), *(t for some in members for t in some)]
    if not every:
        return torch.zeros((), device=groups[0]["params"][0].device if groups and groups[0]["params"] else "cpu")
    options = [(g["lr"], g["weight_decay"], *g["betas"], g["eps"]) for g in groups]
    plain = grad_scale is None and found_inf is None and not any(isinstance(g["lr"], Tensor) for g in groups)
    if plain and native.CPU.module is not None and all(map(fits, every)):
        calls = [*zip(members, options, strict=True), (every[: len(others)], (0.0,) * 5)]
        return torch.tensor(adamw(calls, max_norm), device="cpu")
    gradients = [tensors.gradient for tensors in every]
    norm = nn.utils.get_total_norm(gradients)
    if grad_scale is not None:  # torch's kernel divides the gradients by it
        norm = norm / grad_scale.to(norm.device)
    if max_norm is not None:
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for device in {gradient.device for gradient in gradients}:
            torch._foreach_mul_([gradient for gradient in gradients if gradient.device == device], clip.to(device))
    for some, group in zip(members, groups, strict=True):
        if some:
            parameters, grads, first, second, steps = map(list, zip(*some, strict=True))
            torch_adamw(
                *(parameters, grads, first, second, [], steps),
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
    return norm


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> AdamWTensors:
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    step = state["step"]  # which torch leaves on the CPU if it saved it there
    if step.device != parameter.device or step.dtype is not torch.float32:
        state["step"] = step.to(parameter.device, torch.float32)
    assert parameter.grad is not None
    for name in ("exp_avg", "exp_avg_sq"):  # torch's load_state_dict does not look
        if state[name].shape != parameter.shape:
            raise ValueError(f"{name}: {list(state[name].shape)} in the state, expected {list(parameter.shape)}")
    return AdamWTensors(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
