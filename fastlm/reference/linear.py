"""y = x W^T + b with dense or block-quantised W, and the integer scheme of `compute="fast"`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference.quantized import KINDS, dequantize

__all__ = ["linear", "quantize_activations", "quantized_linear"]

BLOCK = 32


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [..., K], weight [N, K], bias [N]: summed in float32 or, for a float64 input, float64."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    output = input.to(wide) @ weight.to(wide).T
    if bias is not None:
        output = output + bias.to(wide)
    return output.to(input.dtype)


def quantize_activations(input: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K / 32, 32] and float32 scales [..., K / 32, 1] of an input [..., K].

    scale = max|x| / 127 and code = round(x * (127 / max|x|)), halves to even, for each block of 32. A block without
    any |x| >= 2^-100 is all zeros (its scale has no reciprocal); one with an infinity or NaN has the scale NaN.
    """
    blocks = input.float().unflatten(-1, (input.shape[-1] // BLOCK, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    usable = torch.isfinite(largest) & (largest >= 2.0**-100)
    codes = torch.where(usable, torch.round(blocks * (127 / largest)), 0.0)
    scales = torch.where(torch.isfinite(largest), largest / 127, torch.nan)
    return codes.to(torch.int8), torch.where(largest < 2.0**-100, 0.0, scales)


def quantized_linear(input: Tensor, data: Tensor, kind: str, bias: Tensor | None, compute: str) -> Tensor:
    """As `linear` with the weight in one of GGUF's formats, uint8 [N, row_bytes].

    With `compute="fast"` and a block format the input is rounded as `quantize_activations` says. The gradient is
    that of the exact product (the rounding passes it straight through); the weight has none.
    """
    weight = dequantize(data, kind)
    if compute == "fast" and KINDS[kind].block == BLOCK:
        wide = input.double() if input.dtype == torch.float64 else input.float()
        codes, scales = quantize_activations(wide.detach())
        rounded = (codes.to(wide.dtype) * scales.to(wide.dtype)).flatten(-2)
        straight_through = wide - wide.detach()  # zero, with the gradient of the input
        return linear(rounded + straight_through, weight, bias).to(input.dtype)
    return linear(input, weight, bias)
