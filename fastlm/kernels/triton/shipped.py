"""What a Triton kernel module says of the configurations it launches, for compiling them ahead of time.

Each kernel module defines `shipped()`, which yields a `Shipped` for every configuration that a call may launch by
default. `python -m bench gpu-static` compiles them all for every target and reports registers, spills and bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TARGETS", "Shipped", "Work"]

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
"""The architectures that kernels are compiled for."""


@dataclass(frozen=True)
class Work:
    """What one iteration of a kernel's main loop does in one program (block), from its tile sizes."""

    tensor_flops: float = 0.0
    """Floating point operations of its matrix products (2 m n k each)."""
    exponentials: float = 0.0
    """exp2 and other operations of the special-function unit."""
    bytes: float = 0.0
    """Bytes that it reads from global memory."""
    streamed: bool = False
    """Whether each of these bytes is read by one program alone (weights, a cache): they come from memory, not from L2.
    Without matrix products that is taken for granted."""


@dataclass(frozen=True)
class Shipped:
    """One configuration of one kernel."""

    name: str
    """Kernel and variant, as in "attention_forward bf16 d128 causal"."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton's type of each argument that is not a constant: "*bf16", "i32", "fp32", ..."""
    constants: Mapping[str, Any]
    """The value of each `tl.constexpr` argument."""
    num_warps: int
    num_stages: int
    targets: tuple[str, ...] = TARGETS
    divisible_by_16: tuple[str, ...] = ()
    """Arguments that may be taken to be multiples of 16 (pointers, strides), as they are at run time."""
    work: Work = field(default_factory=Work)
    must_use: tuple[str, ...] = ()
    """Matrix instructions that it has to use where the target brought them: "wgmma" (sm_90), "tcgen05" (sm_100)."""
