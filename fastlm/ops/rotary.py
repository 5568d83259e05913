"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import rotary as kernel
from fastlm.ops.checks import describe
from fastlm.ops.library import (
    autograd_by_reference,
    needs_grad,
    opaque_kernel_why_not,
    tracing,
    triton_float_why_not,
    triton_kernel,
    triton_why_not,
)
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import rotary as reference

__all__ = ["rotary"]


def _cpu_why_not(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> str | None:
    if needs_grad(input, cos, sin):
        return "a gradient is wanted"
    return opaque_kernel_why_not(native.CPU, input, cos, sin)


def _triton_why_not(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> str | None:
    if needs_grad(cos, sin):
        return "a gradient of the tables is wanted"
    return triton_float_why_not(input, cos, sin) or triton_why_not(input, starts)


ROTARY = Op(
    "rotary",
    [
        Implementation("cpu", kernel.rotary, _cpu_why_not),
        Implementation("triton", triton_kernel("rotary", "rotary"), _triton_why_not),
        Implementation("reference", reference.rotary, always),
    ],
)


@torch.library.custom_op("fastlm::rotary", mutates_args=())
def _rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> Tensor:
    return ROTARY(input, cos, sin, interleaved, starts).contiguous()


@_rotary.register_fake
def _(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, starts: Tensor | None) -> Tensor:
    return input.new_empty(input.shape)


autograd_by_reference(_rotary, reference.rotary, differentiable=(0, 1, 2))


def _check_starts(starts: Tensor, batch: int, last: int) -> None:
    if starts.shape != (batch,) or starts.dtype != torch.int64 or not starts.is_contiguous():
        raise ValueError(f"rotary: starts is {describe(starts)}, expected contiguous int64 of shape [{batch}]")
    if starts.is_cpu and not tracing():
        for start in starts.tolist():
            if not 0 <= start <= last:
                raise IndexError(f"rotary: starts has {start}, expected 0 to {last} for these tables")


def rotary(
    input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Rotates pairs of each head's features by angles that grow with position: (x cos - y sin, y cos + x sin).

    Su et al., 2021, https://arxiv.org/abs/2104.09864. `fastlm.nn.Rotary` makes the tables.

    Args:
        input: [B, H, T, D], any floating dtype; the rotation is computed in float32 or wider.
        cos: cosines of the angles, [T, R / 2] or [B, T, R / 2] with R <= D; features from R on pass unchanged.
        sin: sines of the same angles, shaped as `cos`.
        interleaved: False pairs feature i with i + R / 2 (GPT-NeoX, transformers' Llama); True pairs 2i with 2i + 1
            (GPT-J, the original Llama).
        starts: int64 [B], contiguous: `cos` and `sin` are tables of all positions, [P, R / 2], and the tokens of
            sequence b are at positions starts[b], starts[b] + 1, ... below P.

    Returns:
        Like `input`.

    Raises:
        ValueError: `input` is not four-dimensional; `cos`, `sin` or `starts` does not fit it.
        IndexError: a position is beyond the tables (checked where looking at `starts` makes no device wait).
    """
    if input.dim() != 4:
        raise ValueError(f"rotary: input is {describe(input)}, expected shape [B, H, T, D]")
    batch, _, tokens, dim = input.shape
    shape = cos.shape
    half = shape[-1] if shape else 0
    wanted = [(tokens, half), (batch, tokens, half)] if starts is None else [(len(cos), half)]
    cos_fits = shape in wanted and 2 * half <= dim
    if not cos_fits or sin.shape != shape:
        name, table = ("sin", sin) if cos_fits else ("cos", cos)
        expected = f"[{tokens}, R/2] or [{batch}, {tokens}, R/2]" if starts is None else "[P, R/2]"
        raise ValueError(
            f"rotary: {name} is {describe(table)}, expected shape {expected} with R <= {dim}, the same for cos and sin"
        )
    if starts is not None:
        _check_starts(starts, batch, len(cos) - tokens)
    if tracing():
        return _rotary(input, cos, sin, interleaved, starts)
    return ROTARY(input, cos, sin, interleaved, starts)
