"""The feed-forward block of a Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.cpu import activation as kernel
from fastlm.kernels.cpu.elementwise import convert
from fastlm.ops.activation import gelu, swiglu
from fastlm.ops.library import differentiable_once, tracing
from fastlm.ops.linear import linear, linear_group
from fastlm.ops.linear_mixed import differentiate, is_mixed, prepared, product, rows

__all__ = ["feed_forward"]


class _MixedFeedForward(torch.autograd.Function):
    """The whole block under bfloat16 autocast on a CPU: one node of autograd's graph in place of three or four."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
    ) -> Tensor:
        x = rows(convert(input, torch.bfloat16))
        gate, up, down = None if gate is None else prepared(gate), prepared(up), prepared(down)
        inner = [product(x, up, up_bias)] if gate is None else [product(x, gate, gate_bias), product(x, up, up_bias)]
        active = kernel.activation("gelu" if gate is None else "silu", *inner)
        ctx.save_for_backward(x, gate, up, down, active, *inner)
        ctx.input = input.shape, input.dtype
        return product(active, down, down_bias).view(*input.shape[:-1], len(down))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("feed_forward")
        x, gate, up, down, active, *inner = ctx.saved_tensors
        wants, (shape, dtype) = ctx.needs_input_grad, ctx.input
        grad_active, *grad_down = differentiate(rows(grad_output), active, down, (True, *wants[5:7]))
        assert grad_active is not None
        grads = kernel.activation_backward("gelu" if gate is None else "silu", grad_active, *inner)
        of_gate, of_up = grads if gate is not None else (None, grads[0])
        assert of_up is not None
        grad_input, *grad_last = differentiate(of_up, x, up, (wants[0], *wants[3:5]), dtype)
        grad_gate: list[Tensor | None] = [None, None]
        if of_gate is not None:
            found, *grad_gate = differentiate(of_gate, x, gate, wants[:3], dtype)
            grad_input = found if grad_input is None or found is None else grad_input.add_(found)
        return None if grad_input is None else grad_input.view(shape), *grad_gate, *grad_last, *grad_down


def feed_forward(
    input: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """`linear` by `down` of `gelu` of `linear` by `up`; with a gate, of `swiglu` of both projections.

    Shazeer, 2020, https://arxiv.org/abs/2002.05202. In training under bfloat16 autocast on a CPU it is one node of
    autograd's graph, with the numbers that the ops one after another give.

    Args:
        input: [..., K], any floating dtype.
        up, gate: [M, K].
        down: [N, M].
        up_bias, gate_bias, down_bias: [M], [M] and [N], or None.

    Returns:
        [..., N].

    Raises:
        ValueError: a shape does not fit, or there is a `gate_bias` without a gate.
    """
    if gate is None and gate_bias is not None:
        raise ValueError("feed_forward: gate_bias is given, expected None without a gate")
    parameters = gate, gate_bias, up, up_bias, down, down_bias
    fits = (
        (up.dim(), down.dim()) == (2, 2)
        and input.shape[-1:] == up.shape[1:]
        and up.shape[:1] == down.shape[1:]
        and (gate is None or gate.shape == up.shape)
        and all(bias is None or bias.shape == up.shape[:1] for bias in (gate_bias, up_bias))
        and (down_bias is None or down_bias.shape == down.shape[:1])
    )
    if fits and not tracing() and is_mixed(input, *parameters):
        result: Tensor = _MixedFeedForward.apply(input, *parameters)
        return result
    if gate is None:
        return linear(gelu(linear(input, up, up_bias)), down, down_bias)
    return linear(swiglu(*linear_group(input, [gate, up], [gate_bias, up_bias])), down, down_bias)
