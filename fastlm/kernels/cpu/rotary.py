"""Native rotary position embedding: csrc/cpu/rotary.cpp."""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels import native

__all__ = ["rotary"]


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> Tensor:
    """Turns float32 input [B, H, T, D] by float32 tables [T, R/2] or [B, T, R/2]; see `fastlm.ops.rotary`."""
    x = input if input.stride(3) == 1 else input.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    output = x.new_empty(x.shape)
    half = cos.shape[-1]
    native.CPU.require().rotary(
        x.data_ptr(),
        x.shape,
        x.stride(),
        cos.data_ptr(),
        sin.data_ptr(),
        half,
        half * x.shape[2] if cos.dim() == 3 else 0,
        native.address(starts),
        output.data_ptr(),
        interleaved,
        native.num_threads(),
    )
    return output
