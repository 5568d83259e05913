"""y = x W^T + b with dense or block-quantised W, and the integer scheme of `compute="fast"`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference.quantized import KINDS, dequantize

__all__ = ["FEW_TOKENS", "linear", "quantize_activations", "quantized_linear", "rounding_bits"]

BLOCK = 32

FEW_TOKENS = 16
"""Up to so many tokens of a sequence are rounded finely: steps of decoding wait for the weights and have arithmetic to
spare. A long prompt has not."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [..., K], weight [N, K], bias [N]: summed in float32 or, for a float64 input, float64."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    output = input.to(wide) @ weight.to(wide).T
    if bias is not None:
        output = output + bias.to(wide)
    return output.to(input.dtype)


def rounding_bits(shape: torch.Size) -> int:
    """To how many bits `compute="fast"` rounds an input of this shape: a row's result then depends on how many tokens
    of its own sequence come with it ([..., T, K]), never on the batch. Of an input [N, K] each row is a sequence.
    """
    return 8 if len(shape) > 2 and shape[-2] > FEW_TOKENS else 15


def quantize_activations(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers [..., K / size, size] and float32 scales [..., K / size, 1] of an input [..., K].

    8 bits: blocks of 16 with steps = 127. 15 bits: blocks of 32 with steps = 127 * 128, an integer being
    128 a + b with a and b of 8 bits. scale = max|x| * (1 / steps) and code = round(x * (steps / max|x|)), halves to
    even. A block without any |x| >= 2^-100 is all zeros (its scale has no reciprocal); one with an infinity or NaN has
    the scale NaN.
    """
    size, steps = {8: (BLOCK // 2, 127), 15: (BLOCK, 127 * 128)}[bits]
    blocks = input.float().unflatten(-1, (input.shape[-1] // size, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    usable = torch.isfinite(largest) & (largest >= 2.0**-100)
    most = torch.full_like(largest, steps)  # a tensor: torch divides a number by one in two roundings
    codes = torch.where(usable, torch.round(blocks * (most / largest)), 0.0)
    scales = torch.where(torch.isfinite(largest), largest * most.reciprocal(), torch.nan)
    return codes.to(torch.int16), torch.where(largest < 2.0**-100, 0.0, scales)


def quantized_linear(input: Tensor, data: Tensor, kind: str, bias: Tensor | None, compute: str) -> Tensor:
    """As `linear` with the weight in one of GGUF's formats, uint8 [N, row_bytes].

    With `compute="fast"` and a block format the input is rounded as `quantize_activations` says. The gradient is
    that of the exact product (the rounding passes it straight through); the weight has none.
    """
    weight = dequantize(data, kind)
    if compute == "fast" and KINDS[kind].block == BLOCK:
        wide = input.double() if input.dtype == torch.float64 else input.float()
        codes, scales = quantize_activations(wide.detach(), rounding_bits(input.shape))
        rounded = (codes.to(wide.dtype) * scales.to(wide.dtype)).flatten(-2)
        straight_through = wide - wide.detach()  # zero, with the gradient of the input
        return linear(rounded + straight_through, weight, bias).to(input.dtype)
    return linear(input, weight, bias)
