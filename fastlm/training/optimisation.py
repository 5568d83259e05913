"""Optimisers, learning-rate schedules, gradient norms, and an optimiser's state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.training.adamw import AdamW
from fastlm.training.config import TrainingConfig
from fastlm.training.muon import Muon
from fastlm.training.precision import cpu_has_fast_bfloat16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weight matrices, decayed; biases, norms and embedding tables, not.

    Shared parameters count once; one shared with an embedding (tied output layer) is an embedding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in trainable if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """`parameter_groups`, the matrices of hidden layers apart, for Muon: an output layer is none of them, its rows
    being tokens as an embedding's are."""
    output = getattr(model, "output", None)
    head = {id(parameter) for parameter in output.parameters()} if isinstance(output, nn.Module) else set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    apart = embeddings | head
    hidden = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in apart]
    groups = parameter_groups(model, weight_decay)
    taken = {id(p) for p in hidden}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    groups.append({"params": hidden, "weight_decay": weight_decay, "muon": True})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of `config` over `parameter_groups`, in a form that makes one pass over all parameters."""
    groups = (muon_groups if config.optimizer == "muon" else parameter_groups)(model, config.weight_decay)
    if not groups:
        raise ValueError("model: no parameter requires a gradient, expected at least one")
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    if config.optimizer == "muon":
        device = groups[0]["params"][0].device
        fast = cpu_has_fast_bfloat16() if device.type == "cpu" else torch.cuda.is_bf16_supported(False)
        dtype = torch.bfloat16 if fast else torch.float32
        return Muon(groups, lr=config.learning_rate, betas=config.betas, dtype=dtype)
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.learning_rate, betas=config.betas)
    return torch.optim.Adam(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainingConfig, total_steps: int | None) -> float:
    """The learning rate of step `step` (from 0).

    Linear warm-up reaches `learning_rate` at step `warmup_steps - 1`; decay then ends at `final_learning_rate` on the
    last step and stays there, should the run go on.
    """
    peak, floor, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant" or total_steps is None:
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return floor + (peak - floor) * remaining


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scales all gradients so that their global norm is at most `max_norm`; returns the norm before (0-d, on device).

    Reads nothing back to the host, so it costs no synchronisation.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float | None
) -> Tensor:
    """Clips as `clip_gradients` and takes the step; together where the optimiser does both at once."""
    scaler.unscale_(optimizer)
    # A scaler may leave out Muon's step, and with it the norm.
    if isinstance(optimizer, AdamW) or (isinstance(optimizer, Muon) and not scaler.is_enabled()):
        scaler.step(optimizer, max_norm=max_norm)
        return optimizer.norm
    norm = clip_gradients(model, max_norm)
    scaler.step(optimizer)
    return norm


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `{"<parameter name>/<key>": tensor}`, e.g. "head.weight/exp_avg"."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = value
    return found


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: str
) -> None:
    """Restores what `state_tensors` gave; `source` names the file in errors.

    Raises `ValueError` where a tensor belongs to no parameter, has another shape, or a parameter has none.
    """
    parameters = dict(model.named_parameters())
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise ValueError(f"{source}: optimizer state {full_name!r} belongs to no parameter of this model")
        parameter = parameters[name]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise ValueError(
                f"{source}: optimizer state {full_name!r} has shape {list(tensor.shape)}, "
                f"expected {list(parameter.shape)}"
            )
        # A fresh allocation: vectorised sums depend on alignment, and a tensor read from a file may sit anywhere.
        by_parameter.setdefault(name, {})[key] = tensor.to(parameter.device, copy=True)
    with_state = set(by_parameter)
    if with_state:
        missing = sorted(name for name, p in parameters.items() if p.requires_grad and name not in with_state)
        if missing:
            raise ValueError(f"{source}: no optimizer state for parameter {missing[0]!r}")
    for name, state in by_parameter.items():
        optimizer.state[parameters[name]] = state
