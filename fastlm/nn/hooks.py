"""Whether a module can be computed without being called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["untouched"]


def untouched(*modules: nn.Module) -> bool:
    """Whether nothing hooks into these modules or has replaced their forward: an op may take what they hold."""
    return not _has_any_global_hook() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in modules
    )
