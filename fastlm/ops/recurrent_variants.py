"""LSTM and GRU with layer normalisation, recurrent dropout or zoneout; the noise is given, or drawn by `drawn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, autograd

from fastlm.kernels import native
from fastlm.kernels.cpu import recurrent_variants as kernel
from fastlm.kernels.cuda import gru as cuda_gru_kernel
from fastlm.kernels.cuda import lstm as cuda_lstm_kernel
from fastlm.ops.checks import expect_shape
from fastlm.ops.library import cuda_why_not, needs_grad, opaque_kernel_why_not
from fastlm.ops.recurrent import NATIVE_DTYPES, SequenceOp, in_float32
from fastlm.ops.registry import Implementation, always
from fastlm.reference import gru, lstm
from fastlm.reference.recurrent import Layer, Noise, States, Weights, draw_noise, sequence

__all__ = ["GRU_VARIANT", "LSTM_VARIANT", "drawn", "gru_variant", "layer_by", "lstm_variant"]

Draw = Callable[[Tensor, States], Sequence[Tensor | None]]
"""(checked input, states) -> the tensors of a `Noise`, zoneout's as many as there are states."""


class _Layer(autograd.Function):
    """One direction of one layer by a native kernel, of the CPU or of CUDA."""

    @staticmethod
    def forward(
        ctx: Any, by: Any, input: Tensor, batch_sizes: list[int], reverse: bool, noise: Sequence[Tensor | None],
        count: int, *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        states, weights = tensors[:count], tensors[count:]
        given = (input, batch_sizes, weights[:4], weights[4:], noise, *states)
        *results, saved = by.layer_forward(*given, reverse=reverse, save=True)
        ctx.save_for_backward(*saved.tensors)
        ctx.by, ctx.count = by, count
        ctx.layout = saved.batch_sizes, saved.reverse
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_input, of_tensors = ctx.needs_input_grad[1], ctx.needs_input_grad[6:]
        needs = (of_input, *of_tensors[ctx.count :], *of_tensors[: ctx.count])
        found = ctx.by.layer_backward(ctx.by.Saved(ctx.saved_tensors, *ctx.layout), grads, needs)
        input, weights, states = found[0], found[1 : -ctx.count], found[-ctx.count :]
        return None, input, None, None, None, None, *states, *weights


def layer_by(by: Any) -> Layer:
    """A layer by a module of kernels, which has, with S states (LSTM: h0 and c0; GRU: h0):

    layer_forward(input, batch_sizes, weights, norms, noise, *states, reverse=, save=) -> (output, *final, saved)
        input: [N, I]; batch_sizes: T ints; reverse, save: bool; weights: (w_ih, w_hh, b_ih | None, b_hh | None).
        norms: (ln_ih, ln_hh), of an LSTM (ln_ih, ln_hh, ln_c, ln_c_bias | None); all None without layer normalisation.
        noise: (dropout, zoneout_h), of an LSTM (dropout, zoneout_h, zoneout_c), each [B, H] or [N, H], or None.
        saved: None without `save`.
    Saved(tensors, batch_sizes, reverse), a named tuple: `tensors` goes through `ctx.save_for_backward`.
    layer_backward(saved, grads, needs) -> gradients of (input, *weights, *norms, *states), None where not needed
        grads: of (output, *final states), None for zero; needs: a bool for each of the results.
    """

    def layer(
        input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, noise: Noise
    ) -> tuple[Tensor, States]:
        count = len(states)
        own, norms, given_noise = weights[:4], weights[5 : 5 + 2 * count], noise[: 1 + count]
        if needs_grad(input, *states, *own, *norms):
            output, *final = _Layer.apply(by, input, batch_sizes, reverse, given_noise, count, *states, *own, *norms)
        else:
            output, *final, _ = by.layer_forward(
                input, batch_sizes, own, norms, given_noise, *states, reverse=reverse, save=False
            )
        return output, tuple(final)

    return layer


def _run_by(layer: Layer) -> Callable[..., tuple[Tensor, States]]:
    """An implementation of one of the ops below, of which the noise is the end of the arguments."""

    def run(*arguments: Any) -> tuple[Tensor, States]:
        return sequence(*(layer, *arguments[:10], Noise(*arguments[10:])))

    return run


def _why_not_by(tensors_why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """Why a kernel can't run, given why it can't take some tensors."""

    def why_not(input: Tensor, states: States, weights: Sequence[Tensor], *rest: Any) -> str | None:
        if input.numel() == 0:
            return "the batch is empty"
        if states[0].shape[-1] != states[-1].shape[-1]:
            return "there is a projection beside layer_norm, recurrent_dropout or zoneout"
        return tensors_why_not(input, *states, *weights, *rest[7:])

    return why_not


def _cpu_why_not(*tensors: Tensor | None) -> str | None:
    return opaque_kernel_why_not(native.CPU, *tensors, dtypes=NATIVE_DTYPES)


def _cuda(by: Any) -> Implementation:
    return Implementation("cuda", _run_by(layer_by(by)), _why_not_by(cuda_why_not))


_CPU = Implementation("cpu", in_float32(_run_by(layer_by(kernel))), _why_not_by(_cpu_why_not))
_SCHEMA = ", bool layer_norm, Tensor? dropout_mask, Tensor? zoneout_h"

LSTM_VARIANT = SequenceOp(
    "lstm_variant",
    4,
    [_CPU, _cuda(cuda_lstm_kernel), Implementation("reference", lstm.lstm, always)],
    f"{_SCHEMA}, Tensor? zoneout_c",
)

GRU_VARIANT = SequenceOp(
    "gru_variant",
    3,
    # On CUDA a product and a kernel for each step: only the LSTM has a kernel for the whole sequence.
    [_CPU, _cuda(cuda_gru_kernel), Implementation("reference", gru.gru, always)],
    _SCHEMA,
)


def drawn(op: str, recurrent_dropout: float, zoneout: Sequence[float], training: bool) -> Draw:
    """How a call of `op` draws its noise from torch's generator. ValueError: a number is no probability."""
    for name, p in (("recurrent_dropout", recurrent_dropout), *(("zoneout", p) for p in zoneout)):
        if not 0 <= p <= 1:
            raise ValueError(f"{op}: {name} is {p}, expected a probability")

    def draw(input: Tensor, states: States) -> Sequence[Tensor | None]:
        noise = draw_noise(input.shape[:-1].numel(), states, recurrent_dropout, zoneout, training)
        return noise[: 1 + len(states)]

    return draw


def _given(op: str, dropout_mask: Tensor | None, *zoneout: Tensor | None) -> Draw:
    """In place of drawing, checks the noise that is given."""

    def checked(input: Tensor, states: States) -> Sequence[Tensor | None]:
        rows = input.shape[:-1].numel()
        shapes = {"dropout_mask": tuple(states[0].shape)}
        for name, state in zip("hc", states, strict=False):
            shapes[f"zoneout_{name}"] = (state.shape[0], rows, state.shape[2])
        noise = (dropout_mask, *zoneout)
        for (name, shape), tensor in zip(shapes.items(), noise, strict=True):
            if tensor is not None and tensor.shape != shape:
                expect_shape(op, name, tensor, shape)
        return [None if tensor is None else tensor.detach().to(input.dtype) for tensor in noise]

    return checked


def lstm_variant(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
    layer_norm: bool = False,
    dropout_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`ops.lstm` with its variants, where the noise is given instead of being drawn; formulas and papers are there.

    Args:
        dropout_mask: [num_layers * D, B, P], by which h is multiplied before W_hh, at every step; or None.
        zoneout_h, zoneout_c: [num_layers * D, N, P] and [num_layers * D, N, H], the shares of the old h and c that are
            kept at each of the N = T * B rows, time first, or those of the packed input; or None. They may be expanded.
            No gradient flows into the three.

    The others and what it returns are those of `ops.lstm`.

    Raises:
        ValueError: as `ops.lstm`, and where the noise's shape does not fit.
    """
    output, (h_n, c_n) = LSTM_VARIANT(
        input, tuple(hx), weights, batch_sizes, num_layers, bidirectional, batch_first, bias,
        dropout if training else 0.0, proj_size, layer_norm, layer_norm=layer_norm,
        draw=_given("lstm_variant", dropout_mask, zoneout_h, zoneout_c),
    )  # fmt: skip
    return output, (h_n, c_n)


def gru_variant(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
    layer_norm: bool = False,
    dropout_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.gru` with its variants, where the noise is given instead of being drawn; formulas and papers are there.

    Args:
        dropout_mask, zoneout_h: as those of `lstm_variant`, where P is H.

    The others and what it returns are those of `ops.gru`.

    Raises:
        ValueError: as `ops.gru`, and where the noise's shape does not fit.
    """
    output, (h_n,) = GRU_VARIANT(
        input, (h0,), weights, batch_sizes, num_layers, bidirectional, batch_first, bias,
        dropout if training else 0.0, 0, layer_norm, layer_norm=layer_norm,
        draw=_given("gru_variant", dropout_mask, zoneout_h),
    )  # fmt: skip
    return output, h_n
