"""Recurrent modules of fastlm.nn beside torch's of the same name and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastlm.nn


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and torch's, with the same weights."""
    ours, theirs = getattr(fastlm.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def leaves(results: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]


def hidden(name: str, module: Any, *shape: int) -> Any:
    """A random hx."""
    out = module.proj_size or module.hidden_size
    h = torch.randn(*shape, out)
    return (h, torch.randn(*shape, module.hidden_size)) if name == "LSTM" else h


def raised(function: Any) -> tuple[type[BaseException], str] | None:
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None
