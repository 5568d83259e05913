"""Argument checks for the ops: each error names the argument, what it was, and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["describe", "expect_shape", "refuse", "usable_device"]


def usable_device(device: torch.device | str) -> torch.device:
    """The device, "auto" being a GPU if there is one. ValueError: torch can't use it here, and why."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {str(device)!r} cannot be used: {error}") from error
    return found


def describe(tensor: Tensor) -> str:
    """What an error says of a tensor: dtype, shape and device, as in "float32 [2, 3] on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def expect_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `tensor` has the expected shape; a string in `expected` names a free dimension."""
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=True)
    ):
        return
    wanted = ", ".join(str(size) for size in expected)
    raise ValueError(f"{op}: {name} is {describe(tensor)}, expected shape [{wanted}]")


def refuse(*pairs: tuple[bool, str]) -> str | None:
    """The first reason whose condition holds, for `why_not` functions; None where none does."""
    for condition, reason in pairs:
        if condition:
            return reason
    return None
