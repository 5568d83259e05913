"""The LSTM with layer normalisation, recurrent dropout or zoneout, the noise being given: `ops.lstm` draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, autograd

from fastlm.kernels import cuda, native
from fastlm.kernels.cpu import lstm_variants as kernel
from fastlm.kernels.cuda import lstm as cuda_kernel
from fastlm.ops.checks import expect_shape
from fastlm.ops.library import needs_grad, opaque_kernel_why_not
from fastlm.ops.recurrent import NATIVE_DTYPES, SequenceOp, in_float32
from fastlm.ops.registry import Implementation, always
from fastlm.reference import lstm as reference
from fastlm.reference.recurrent import Layer, Noise, States, Weights, sequence

__all__ = ["LSTM_VARIANT", "layer_by", "lstm_variant"]


class _Layer(autograd.Function):
    """One direction of one layer by a native kernel, of the CPU or of CUDA."""

    @staticmethod
    def forward(
        ctx: Any, by: Any, input: Tensor, batch_sizes: list[int], reverse: bool, noise: Noise, h0: Tensor,
        c0: Tensor, *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found = by.layer_forward(input, batch_sizes, weights[:4], weights[5:], noise, h0, c0, reverse, True)
        output, h_n, c_n, saved = found
        ctx.save_for_backward(*saved.tensors)
        ctx.by = by
        ctx.layout = saved.batch_sizes, saved.reverse
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    @autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, of_input, _, _, _, of_h0, of_c0, *of_weights = ctx.needs_input_grad
        needs = (of_input, *of_weights[:4], *of_weights[5:], of_h0, of_c0)
        found = ctx.by.layer_backward(ctx.by.Saved(ctx.saved_tensors, *ctx.layout), grads, needs)
        input, *weights, h0, c0 = found
        return None, input, None, None, None, h0, c0, *weights[:4], None, *weights[4:]


def layer_by(by: Any) -> Layer:
    """A layer by `layer_forward` and `layer_backward` of a module of kernels."""

    def layer(
        input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, noise: Noise
    ) -> tuple[Tensor, States]:
        h0, c0 = states
        if needs_grad(input, h0, c0, *weights):
            output, h_n, c_n = _Layer.apply(by, input, batch_sizes, reverse, noise, h0, c0, *weights)
        else:
            given = (input, batch_sizes, weights[:4], weights[5:], noise, h0, c0, reverse, False)
            output, h_n, c_n, _ = by.layer_forward(*given)
        return output, (h_n, c_n)

    return layer


_cpu_layer, _cuda_layer = layer_by(kernel), layer_by(cuda_kernel)


def _cpu_run(*arguments: Any) -> tuple[Tensor, States]:
    return sequence(*(_cpu_layer, *arguments[:10], Noise(*arguments[10:])))


def _cuda_run(*arguments: Any) -> tuple[Tensor, States]:
    return sequence(*(_cuda_layer, *arguments[:10], Noise(*arguments[10:])))


def _why_not_by(tensors_why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """Why a kernel can't run, given why it can't take some tensors."""

    def why_not(input: Tensor, states: States, weights: Sequence[Tensor], *rest: Any) -> str | None:
        if input.numel() == 0:
            return "the batch is empty"
        if states[0].shape[-1] != states[1].shape[-1]:
            return "there is a projection beside layer_norm, recurrent_dropout or zoneout"
        return tensors_why_not(input, *states, *weights, *rest[7:])

    return why_not


def _cpu_why_not(*tensors: Tensor | None) -> str | None:
    return opaque_kernel_why_not(native.CPU, *tensors, dtypes=NATIVE_DTYPES)


LSTM_VARIANT = SequenceOp(
    "lstm_variant",
    4,
    [
        Implementation("cpu", in_float32(_cpu_run), _why_not_by(_cpu_why_not)),
        Implementation("cuda", _cuda_run, _why_not_by(cuda.why_not)),
        Implementation("reference", reference.lstm, always),
    ],
    ", bool layer_norm, Tensor? dropout_mask, Tensor? zoneout_h, Tensor? zoneout_c",
)


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

    def checked(input: Tensor, states: States) -> Sequence[Tensor | None]:
        (layers, batch, outputs), hidden = states[0].shape, states[1].shape[2]
        rows = input.shape[:-1].numel()
        shapes = {"dropout_mask": (layers, batch, outputs), "zoneout_h": (layers, rows, outputs)}
        shapes["zoneout_c"] = (layers, rows, hidden)
        noise = (dropout_mask, zoneout_h, zoneout_c)
        for (name, shape), tensor in zip(shapes.items(), noise, strict=True):
            if tensor is not None and tensor.shape != shape:
                expect_shape("lstm_variant", name, tensor, shape)
        return [None if tensor is None else tensor.detach().to(input.dtype) for tensor in noise]

    output, (h_n, c_n) = LSTM_VARIANT(
        input, tuple(hx), weights, batch_sizes, num_layers, bidirectional, batch_first, bias,
        dropout if training else 0.0, proj_size, layer_norm, layer_norm=layer_norm, draw=checked,
    )  # fmt: skip
    return output, (h_n, c_n)
