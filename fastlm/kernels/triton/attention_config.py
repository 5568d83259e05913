"""Tile sizes of the attention kernels: defaults per architecture, by the reports of `python -m bench gpu-static`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Config", "choose"]


class Config(NamedTuple):
    """Rows of queries and of keys a block has, and how it is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def blocks(self, names: Sequence[str]) -> dict[str, int]:
        """The sizes among a kernel's arguments."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return {name: size for name, size in sizes.items() if name in names}

    def for_rows(self, rows: int) -> Config:
        """The same with no more rows than there are."""
        return self if rows >= self.block_m else self._replace(block_m=max(16, triton.next_power_of_2(rows)))


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose(kernel: str, query: Tensor, block_d: int) -> Config:
    """The default of a kernel ("forward", "grad_key_value", "grad_query") for these tensors."""
    return Config(32, 16, 4, 1)
