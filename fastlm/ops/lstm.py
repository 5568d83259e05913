"""Long short-term memory: the sequence and the cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch.autograd import forward_ad

from fastlm.kernels import cuda, native
from fastlm.kernels.cpu import lstm as kernel
from fastlm.kernels.cuda import lstm as cuda_kernel
from fastlm.ops.checks import refuse
from fastlm.ops.library import (
    autograd_by_reference,
    cuda_why_not,
    needs_grad,
    opaque_kernel_why_not,
    tracing,
    undisturbed,
)
from fastlm.ops.recurrent import NATIVE_DTYPES, SequenceOp, check_cell, in_float32, matrix_unit_why_not, torch_sequence
from fastlm.ops.recurrent_variants import LSTM_VARIANT, drawn
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import lstm as reference
from fastlm.reference.recurrent import NORMAL, Noise, States, Weights, sequence

__all__ = ["lstm", "lstm_cell"]

_MATRIX_UNIT_ROWS = 8  # measured forward and with gradients at H 256 and 512: at 4 ours is faster, at 16 torch's


def _forward(
    input: Tensor,
    batch_sizes: list[int],
    reverse: bool,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, kernel.Saved | None]:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    return kernel.layer_forward(input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, reverse, save)


class _Layer(torch.autograd.Function):
    """One direction of one layer by the native kernel."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, batch_sizes: list[int], reverse: bool, h0: Tensor, c0: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, h_n, c_n, saved = _forward(input, batch_sizes, reverse, h0, c0, weights, save=True)
        assert saved is not None
        ctx.save_for_backward(*saved.tensors)
        ctx.layout = saved.batch_sizes, saved.reverse
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_input, _, _, of_h0, of_c0, *of_weights = ctx.needs_input_grad
        needs = (of_input, *of_weights, of_h0, of_c0)
        input, *weights, h0, c0 = _LayerGradients.apply(needs, *ctx.layout, *grads, *ctx.saved_tensors)
        return input, None, None, h0, c0, *weights


class _LayerGradients(torch.autograd.Function):
    """The backward of `_Layer`, a function of its own so that differentiating it fails with a reason."""

    @staticmethod
    def forward(
        ctx: Any, needs: Sequence[bool], batch_sizes: list[int], reverse: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, grad_h_n, grad_c_n, *saved = tensors
        saved_forward = kernel.Saved(tuple(saved), batch_sizes, reverse)
        return tuple(kernel.layer_backward(saved_forward, grad_output, grad_h_n, grad_c_n, needs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "lstm: the native backward has no derivative of its own; run the forward under "
            "fastlm.backend('reference') to differentiate it twice"
        )


def _cpu_layer(
    input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, noise: Noise = NORMAL
) -> tuple[Tensor, States]:
    h0, c0 = states
    if needs_grad(input, h0, c0, *weights):
        output, h_n, c_n = _Layer.apply(input, batch_sizes, reverse, h0, c0, *weights[:5])
    else:
        output, h_n, c_n, _ = _forward(input, batch_sizes, reverse, h0, c0, weights[:5], save=False)
    return output, (h_n, c_n)


def _cpu_run(
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    *rest: Any,
) -> tuple[Tensor, States]:
    # One step of one layer, as when generating: the cell, past the loops, which cost as much as a small step itself.
    if (
        batch_sizes is None
        and num_layers == 1
        and not bidirectional
        and input.shape[1 if batch_first else 0] == 1
        and len(weights) % 2 == 0  # no projection
        and not needs_grad(input, *states, *weights)
    ):
        h0, c0 = states
        w_ih, w_hh, *biases = weights
        b_ih, b_hh = biases or (None, None)
        h, c = kernel.cell(input.flatten(0, 1), h0[0], c0[0], w_ih, w_hh, b_ih, b_hh)
        output = h.clone().view(*input.shape[:2], -1)  # not the memory of h_n, which a caller may change
        return output, (h.unsqueeze(0), c.unsqueeze(0))
    return sequence(_cpu_layer, input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, *rest)


def streaming_step(
    input: Tensor, hx: Any, weights: Sequence[Tensor], batch_first: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """`lstm` for one time step of one layer in one direction, as when generating, where `_cpu_run` has been before.

    The short way there. A step streams the weights through the caches and so throws out all else: every frame, tensor
    and attribute that the general way touches is a miss, and together they took a third of the step.

    Returns:
        What `lstm` would, or None where these arguments, or the modes that are on, need `lstm` to look at them.
    """
    if not undisturbed() or type(hx) is not tuple or len(hx) != 2:
        return None
    h0, c0 = hx
    steps = input.shape[:-1]
    if len(steps) != 2 or steps[0] != 1 or (batch_first and steps[1] != 1):
        return None
    # The output is not the memory of h_n, which a caller may change.
    found = kernel.prepared_cell(input, h0, c0, weights if len(weights) == 4 else (*weights, None, None), copy=True)
    if found is None:
        return None
    h_n, c_n, output = found
    assert output is not None
    return output, (h_n, c_n)


def _cpu_why_not(
    input: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, *rest: Any
) -> str | None:
    if input.numel() == 0:
        return "the batch is empty"
    reason = matrix_unit_why_not(input, batch_sizes, bool(rest and rest[2]), _MATRIX_UNIT_ROWS)
    if reason is not None:
        return reason
    # No size of float32 is left to torch: from B 1 to 256 and H 256 to 1024 the kernel was ahead of it, forward 1.05 to
    # 1.6 times, with backward 1.2 to 2.3, held to the same instruction set (AVX2 or AVX-512, one thread).
    return opaque_kernel_why_not(native.CPU, input, *states, *weights, dtypes=NATIVE_DTYPES)


def _cpu_cell(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    if input.dtype is not torch.float32:
        h_next, c_next = _cpu_cell(input.float(), h.float(), c.float(), w_ih, w_hh, b_ih, b_hh)
        return h_next.to(h.dtype), c_next.to(c.dtype)
    if needs_grad(input, h, c, w_ih, w_hh, b_ih, b_hh):
        _, (h, c) = _cpu_layer(input, [input.shape[0]], (h, c), Weights(w_ih, w_hh, b_ih, b_hh), False)
        return h, c
    return kernel.cell(input, h, c, w_ih, w_hh, b_ih, b_hh)


def _cpu_cell_why_not(input: Tensor, *tensors: Tensor | None) -> str | None:
    if input.numel() == 0:
        return "the batch is empty"
    return opaque_kernel_why_not(native.CPU, input, *tensors, dtypes=NATIVE_DTYPES)


def _cuda_layer(
    input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, noise: Noise = NORMAL
) -> tuple[Tensor, States]:
    h, c = states
    state = cuda_kernel.step(input, h, c, weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh)
    return state[0].clone(), state  # the output is not the memory of h_n, which a caller may change


def _cuda_run(*arguments: Any) -> tuple[Tensor, States]:
    return sequence(*(_cuda_layer, *arguments))


def _cuda_step_why_not(rows: int, *tensors: Tensor | None) -> str | None:
    """Of one step without gradients; all else of the plain LSTM is faster in cuDNN and cuBLAS, that is, by torch."""
    return cuda_why_not(*tensors) or refuse(
        (needs_grad(*tensors), "a gradient is wanted: torch's is faster (cuDNN)"),
        (rows == 0, "the batch is empty"),
        (rows > cuda_kernel.MOST_ROWS, f"there are {rows} rows: from {cuda_kernel.MOST_ROWS + 1} on torch is faster"),
    )


def _cuda_why_not(
    input: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, *rest: Any
) -> str | None:
    steps = 1 if batch_sizes is not None else input.shape[1 if rest[2] else 0]
    return cuda.unavailable() or refuse(
        (
            batch_sizes is not None or steps > 1,
            "a sequence of a plain LSTM: torch's is faster (cuDNN); with layer_norm, recurrent_dropout or zoneout, "
            "which cuDNN lacks, ours runs",
        ),
        (states[0].shape[-1] != states[1].shape[-1], "there is a projection"),
    ) or _cuda_step_why_not(states[0].shape[1], input, *states, *weights)  # fmt: skip


def _cuda_cell_why_not(input: Tensor, *tensors: Tensor | None) -> str | None:
    return _cuda_step_why_not(input.shape[0], input, *tensors)


def _torch_why_not(*_: Any) -> str | None:
    if forward_ad._current_level >= 0:
        return "torch's own LSTM has no forward-mode derivative"
    return None


def _torch_cell(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _VF.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)


LSTM = SequenceOp(
    "lstm",
    4,
    [
        Implementation("cpu", in_float32(_cpu_run), _cpu_why_not),
        Implementation("cuda", _cuda_run, _cuda_why_not),
        Implementation("torch", torch_sequence(_VF.lstm), _torch_why_not),
        Implementation("reference", reference.lstm, always),
    ],
)

LSTM_CELL = Op(
    "lstm_cell",
    [
        Implementation("cpu", _cpu_cell, _cpu_cell_why_not),
        Implementation("cuda", cuda_kernel.step, _cuda_cell_why_not),
        Implementation("torch", _torch_cell, always),
        Implementation("reference", reference.lstm_cell, always),
    ],
)


def lstm(
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
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """i, f, o = sigmoid(...), g = tanh(W_ig x + b_ig + W_hg h + b_hg), c' = f * c + i * g, h' = o * tanh(c').

    Hochreiter & Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735, as `torch.nn.LSTM`; with `proj_size`
    h' is multiplied by W_hr (Sak et al., 2014, https://arxiv.org/abs/1402.1128). The formulas of the last three
    arguments, which combine freely, are those of `reference.lstm.lstm_cell`.

    Args:
        input: [T, B, I]; [B, T, I] where `batch_first`; [N, I] with `batch_sizes`. Any floating dtype.
        hx: h0 [num_layers * D, B, P] and c0 [num_layers * D, B, H], where D is 2 if `bidirectional`, else 1, and P is
            `proj_size`, or H where that is 0.
        weights: in the order of `torch.nn.LSTM`: for each layer and direction w_ih [4H, I], w_hh [4H, P], with `bias`
            b_ih [4H], b_hh [4H], and with `proj_size` w_hr [P, H]; the gates in the order i, f, g, o. With `layer_norm`
            then the gains ln_ih [4H], ln_hh [4H], ln_c [H] and, with `bias`, ln_c_bias [H].
        dropout: probability of zeroing an element of each layer's output but the last's, where `training`.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU: rows still running at each time, longest first.
        layer_norm: normalises W_ih x, W_hh h, and c on its way to h (Ba et al., 2016, https://arxiv.org/abs/1607.06450).
        recurrent_dropout: where `training`, probability of zeroing an element of h before W_hh, the same ones at every
            step (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287).
        zoneout: probabilities with which an element of h, and of c, stays as it was; outside of `training` their
            expectation (Krueger et al., 2017, https://arxiv.org/abs/1606.01305).

    Returns:
        output, like `input` with D * P in the last dimension, and (h_n, c_n), like `hx`.

    Raises:
        ValueError: a shape or dtype does not fit, the sequence is empty, `batch_sizes` are inconsistent, or a
            probability is none.
    """
    dropout = dropout if training else 0.0
    recurrent_dropout = recurrent_dropout if training else 0.0
    layout = (weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout, proj_size)
    if layer_norm or recurrent_dropout or zoneout != (0.0, 0.0):
        draw = drawn("lstm", recurrent_dropout, zoneout, training)
        output, (h_n, c_n) = LSTM_VARIANT(input, tuple(hx), *layout, layer_norm, layer_norm=layer_norm, draw=draw)
    else:
        output, (h_n, c_n) = LSTM(input, tuple(hx), *layout)
    return output, (h_n, c_n)


@torch.library.custom_op("fastlm::lstm_cell", mutates_args=())
def _lstm_cell(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    h_next, c_next = LSTM_CELL(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return h_next.contiguous(), c_next.contiguous()


@_lstm_cell.register_fake
def _(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), c.new_empty(c.shape)


autograd_by_reference(_lstm_cell, reference.lstm_cell, differentiable=range(7))


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`, without projection.

    Args:
        input: [B, I], any floating dtype.
        hx: h and c, each [B, H].
        w_ih, w_hh: [4H, I], [4H, H]; the gates in the order i, f, g, o.
        b_ih, b_hh: [4H] or None.

    Returns:
        The next h and c, each [B, H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    h, c = hx
    if input.dim() == 2 and undisturbed():  # the short way, as in `streaming_step`
        found = kernel.prepared_cell(input, h, c, (w_ih, w_hh, b_ih, b_hh), copy=False)
        if found is not None:
            return found[:2]
    check_cell("lstm_cell", 4, input, (h, c), w_ih, w_hh, b_ih, b_hh)
    if tracing():
        return _lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return LSTM_CELL(input, h, c, w_ih, w_hh, b_ih, b_hh)
