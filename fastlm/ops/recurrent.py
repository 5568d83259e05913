"""What the sequence ops lstm, gru and rnn have in common: checks, torch's own implementation, and the custom op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, autograd
from torch.nn import functional

from fastlm.kernels import native
from fastlm.kernels.cpu import recurrent as kernel
from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.library import (
    autograd_in_custom_op,
    differentiable_once,
    needs_grad,
    opaque_kernel_why_not,
    tracing,
)
from fastlm.ops.registry import Implementation, Op, forced_backend
from fastlm.reference.recurrent import Noise, States, Weights, sequence

__all__ = [
    "NATIVE_DTYPES",
    "SequenceOp",
    "check_cell",
    "in_float32",
    "matrix_unit_why_not",
    "native_cell",
    "native_cell_why_not",
    "native_sequence",
    "native_sequence_why_not",
    "torch_sequence",
]

_ARGUMENTS = (
    "Tensor input, Tensor[] states, Tensor[] weights, Tensor? batch_sizes, "
    "int num_layers, bool bidirectional, bool batch_first, bool bias"
)


def torch_sequence(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, States]]:
    """An implementation that calls torch's fused operator, as `torch.nn.LSTM` does."""

    def run(
        input: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        bias: bool,
        dropout: float,
    ) -> tuple[Tensor, States]:
        hx = states if len(states) > 1 else states[0]
        # cuDNN keeps what its backward needs only where it is told that this is training.
        train = dropout > 0 or needs_grad(input, *states, *weights)
        options = (weights, bias, num_layers, dropout, train, bidirectional)
        if batch_sizes is None:
            output, *final = function(input, hx, *options, batch_first)
        else:
            output, *final = function(input, batch_sizes, hx, *options)
        return output, tuple(final)

    return run


NATIVE_DTYPES = (torch.float32, torch.bfloat16)
"""What the native recurrent kernels take, the same for all tensors of a call."""

_MATRIX_UNIT_ROWS = 32  # measured for GRU and RNN at H 512: at 16 ours is as fast or faster
_TRAINING_STEPS = 4  # measured for GRU and RNN at H 128 and 512, B 1 and 16, with weights that change between steps


def in_float32(run: Callable[..., tuple[Tensor, States]]) -> Callable[..., tuple[Tensor, States]]:
    """An implementation's `run` for bfloat16 too: states and activations are float32 within and rounded at the end."""

    def widened(input: Tensor, states: States, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, States]:
        dtype = input.dtype
        if dtype is torch.float32:
            return run(input, states, weights, *rest)
        noise = (r.float() if isinstance(r, Tensor) and r.dtype is dtype else r for r in rest)
        output, final = run(input.float(), tuple(s.float() for s in states), weights, *noise)
        return output.to(dtype), tuple(s.to(dtype) for s in final)

    return widened


class _Layer(autograd.Function):
    """One direction of one layer of a GRU or a plain RNN by our kernel."""

    @staticmethod
    def forward(
        ctx: Any, cell: str, batch_sizes: list[int], reverse: bool, input: Tensor, h0: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, h_n, saved = kernel.layer_forward(cell, input, batch_sizes, h0, weights, reverse, save=True)
        assert saved is not None
        ctx.save_for_backward(*saved.tensors)
        ctx.layout = saved[1:]
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable_once("gru" if ctx.layout[0] == "gru" else "rnn")
        saved = kernel.Saved(ctx.saved_tensors, *ctx.layout)
        of_output, of_h_n = grads
        return None, None, None, *kernel.layer_backward(saved, of_output, of_h_n, ctx.needs_input_grad[3:])


def _native_layer(
    cell: str, input: Tensor, batch_sizes: list[int], h0: Tensor, weights: Sequence[Tensor | None], reverse: bool
) -> tuple[Tensor, Tensor]:
    if needs_grad(input, h0, *weights):
        return _Layer.apply(cell, batch_sizes, reverse, input, h0, *weights)
    return kernel.layer_forward(cell, input, batch_sizes, h0, weights, reverse)[:2]


def native_sequence(cell: str) -> Callable[..., tuple[Tensor, States]]:
    """The implementation by our kernel for GRU ("gru") and plain RNN ("tanh", "relu")."""

    def layer(
        input: Tensor, batch_sizes: list[int], states: States, weights: Weights, reverse: bool, _: Noise
    ) -> tuple[Tensor, States]:
        output, h_n = _native_layer(cell, input, batch_sizes, states[0], weights[:4], reverse)
        return output, (h_n,)

    def run(*args: Any) -> tuple[Tensor, States]:
        return sequence(layer, *args)

    return in_float32(run)


def native_cell(cell: str) -> Callable[..., Tensor]:
    """One step of `native_sequence`: (input, h, w_ih, w_hh, b_ih, b_hh) -> the next h."""

    def run(input: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
        return _native_layer(cell, input.float(), [input.shape[0]], h.float(), weights, False)[0].to(h.dtype)

    return run


def native_sequence_why_not(
    input: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, *rest: Any
) -> str | None:
    """Why the kernel of `native_sequence` can't run, or had better not; None where it should."""
    steps = input.shape[1 if rest[2] else 0] if batch_sizes is None else len(batch_sizes)
    reason = matrix_unit_why_not(input, batch_sizes, rest[2], _MATRIX_UNIT_ROWS)
    return reason or _native_why_not(steps, input, *states, *weights)


def matrix_unit_why_not(input: Tensor, batch_sizes: Tensor | None, batch_first: bool, rows: int) -> str | None:
    """Why torch should take a padded sequence of at least so many rows in bfloat16; None where ours should.

    For single steps ours, whose bits don't depend on the batch, as generation wants them.
    """
    if input.dtype is not torch.bfloat16 or batch_sizes is not None or forced_backend() is not None:
        return None
    steps, batch = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    if steps > 1 and batch >= rows and torch.cpu._is_amx_tile_supported():
        return f"from {rows} rows of bfloat16 torch's, on the processor's matrix unit (AMX), is faster"
    return None


def native_cell_why_not(input: Tensor, *tensors: Tensor | None) -> str | None:
    """The same of `native_cell`."""
    return _native_why_not(1, input, *tensors)


def _native_why_not(steps: int, input: Tensor, *tensors: Tensor | None) -> str | None:
    if input.numel() == 0:
        return "the batch is empty"
    if steps < _TRAINING_STEPS and needs_grad(input, *tensors) and forced_backend() is None:
        return f"gradients of fewer than {_TRAINING_STEPS} steps: torch's are faster than packing the weights"
    return opaque_kernel_why_not(native.CPU, input, *tensors, dtypes=NATIVE_DTYPES)


class SequenceOp:
    """A recurrent op over sequences: its implementations, its checks, and its custom op for torch.compile.

    Implementations take (input, states, weights, batch_sizes, num_layers, bidirectional, batch_first, bias, dropout,
    *extra) as `reference.recurrent.sequence` documents them; `dropout` is 0 outside training.

    The custom op knows no dropout: a traced call with dropout becomes one custom op for each layer with torch's
    dropout between them, so that forward and backward see the same mask whatever the compiler does.
    """

    def __init__(self, name: str, gates: int, implementations: Sequence[Implementation], extra: str = "") -> None:
        self.name = name
        self.gates = gates
        self.op = Op(name, implementations)
        self.custom = self._define_custom(extra)

    def __call__(
        self,
        input: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        bias: bool,
        dropout: float,
        proj_size: int,
        *extra: Any,
        layer_norm: bool = False,
        draw: Callable[[Tensor, States], Sequence[Any]] | None = None,
    ) -> tuple[Tensor, States]:
        """Checks the arguments, then runs an implementation.

        `proj_size` and `layer_norm` are for the checks alone; `draw` gives what comes after `extra`, from the checked
        input and states.
        """
        if weights and input.dtype != weights[0].dtype and torch.is_autocast_enabled(input.device.type):
            input = input.to(weights[0].dtype)
            states = tuple(s.to(weights[0].dtype) for s in states)
        layout = (num_layers, bidirectional, batch_first, bias)
        self._check(input, states, weights, batch_sizes, *layout, dropout, proj_size, layer_norm)
        if draw is not None:
            extra = (*extra, *draw(input, states))
        if tracing():
            return self._traced(input, states, weights, batch_sizes, *layout, dropout, *extra)
        if batch_sizes is not None:
            self._check_batch_sizes(batch_sizes, input, states[0])
        return self.op(input, states, weights, batch_sizes, *layout, dropout, *extra)

    def _check(
        self,
        input: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        bias: bool,
        dropout: float,
        proj_size: int,
        layer_norm: bool,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"{self.name}: num_layers is {num_layers}, expected at least 1")
        directions = 2 if bidirectional else 1
        cell_norms = (1 + bias) * (len(states) == 2)
        count = num_layers * directions * (2 + 2 * bias + (proj_size != 0) + (2 + cell_norms) * layer_norm)
        if len(weights) != count:
            raise ValueError(f"{self.name}: weights has {len(weights)} tensors, expected {count}")
        rows = weights[0].shape[0]
        hidden = rows // self.gates
        if hidden * self.gates != rows:
            raise ValueError(
                f"{self.name}: weights[0] is {describe(weights[0])}, expected a multiple of {self.gates} rows"
            )
        width = input.shape[-1]
        if proj_size and not 0 < proj_size < hidden:  # as in torch, whose operator tells projections by their sizes
            raise ValueError(f"{self.name}: proj_size is {proj_size}, expected less than the hidden size, {hidden}")
        out = proj_size or hidden
        biases = ((rows,), (rows,)) if bias else ()
        projection = ((out, hidden),) if proj_size else ()
        norms = ((rows,), (rows,), *[(hidden,)] * cell_norms) if layer_norm else ()
        dtype = input.dtype
        position = 0
        for _ in range(num_layers):
            shapes = ((rows, width), (rows, out), *biases, *projection, *norms)
            for _ in range(directions):
                for shape in shapes:
                    weight = weights[position]
                    if weight.shape != shape or weight.dtype != dtype:
                        expect_shape(self.name, f"weights[{position}]", weight, shape)
                        raise ValueError(f"{self.name}: weights[{position}] is {describe(weight)}, the input {dtype}")
                    position += 1
            width = out * directions
        batch: int | str
        if batch_sizes is None:
            if input.dim() != 3:
                raise ValueError(f"{self.name}: input is {describe(input)}, expected 3 dimensions")
            steps, batch = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
            if steps == 0:
                raise ValueError(f"{self.name}: input is {describe(input)}, expected at least one time step")
        else:
            if input.dim() != 2:
                raise ValueError(f"{self.name}: input is {describe(input)}, expected 2 dimensions with batch_sizes")
            batch = states[0].shape[1] if states[0].dim() == 3 else "B"
        sizes = (out, hidden)
        for index, state in enumerate(states):
            if state.shape != (num_layers * directions, batch, sizes[index]) or state.dtype != dtype:
                name = "h0" if index == 0 else "c0"
                expect_shape(self.name, name, state, (num_layers * directions, batch, sizes[index]))
                raise ValueError(f"{self.name}: {name} is {describe(state)}, the input {dtype}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{self.name}: dropout is {dropout}, expected a probability")

    def _check_batch_sizes(self, batch_sizes: Tensor, input: Tensor, h0: Tensor) -> None:
        sizes = batch_sizes.tolist()
        if not sizes or sizes[0] != h0.shape[1] or sum(sizes) != input.shape[0] or sizes[-1] < 1:
            raise ValueError(
                f"{self.name}: batch_sizes {sizes} don't fit an input of {input.shape[0]} rows with a batch of "
                f"{h0.shape[1]}: expected positive sizes that start at the batch and add up to the rows"
            )
        if any(a < b for a, b in pairwise(sizes)):
            raise ValueError(f"{self.name}: batch_sizes {sizes} grow: expected the longest rows first")

    def _traced(
        self,
        input: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        bias: bool,
        dropout: float,
        *extra: Any,
    ) -> tuple[Tensor, States]:
        layout = (bidirectional, batch_first, bias, *extra)
        if not dropout or num_layers == 1:
            output, *final = self.custom(input, states, weights, batch_sizes, num_layers, *layout)
            return output, tuple(final)
        directions = 2 if bidirectional else 1
        size = len(weights) // num_layers
        finals = []
        for index in range(num_layers):
            if index:
                input = functional.dropout(input, dropout)
            own = slice(index * directions, (index + 1) * directions)  # of what has layers as its first dimension
            input, *final = self.custom(
                input,
                [s[own] for s in states],
                weights[index * size : (index + 1) * size],
                batch_sizes,
                1,
                *(value[own] if isinstance(value, Tensor) else value for value in layout),
            )
            finals.append(final)
        return input, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))

    def _define_custom(self, extra: str) -> Callable[..., list[Tensor]]:
        """Defines fastlm::<name> -> [output, *states], and fastlm::<name>_vjp for its backward.

        The backward is an op of its own, since a compiler that traced into it would unroll the time steps. It runs
        the forward again: nothing but the inputs is kept between the two.
        """
        name, op = self.name, self.op
        vjp_name = f"{name}_vjp"

        def forward(input: Tensor, states: list[Tensor], weights: list[Tensor], *rest: Any) -> list[Tensor]:
            batch_sizes, num_layers, bidirectional, batch_first, bias, *more = rest
            if batch_sizes is not None:
                self._check_batch_sizes(batch_sizes, input, states[0])
            layout = (num_layers, bidirectional, batch_first, bias)
            output, final = op(input, tuple(states), weights, batch_sizes, *layout, 0.0, *more)
            return [output.contiguous(), *(s.clone(memory_format=torch.contiguous_format) for s in final)]

        def fake(input: Tensor, states: list[Tensor], weights: list[Tensor], *rest: Any) -> list[Tensor]:
            width = states[0].shape[-1] * (2 if rest[2] else 1)
            return [input.new_empty((*input.shape[:-1], width)), *(s.new_empty(s.shape) for s in states)]

        def vjp(grads: list[Tensor], wanted: list[bool], *inputs: Any) -> list[Tensor]:
            input, states, weights, *rest = inputs
            tensors = [t.detach().requires_grad_(w) for t, w in zip([input, *states, *weights], wanted, strict=True)]
            leaves = [t for t in tensors if t.requires_grad]
            with autograd_in_custom_op():
                outputs = forward(tensors[0], tensors[1 : 1 + len(states)], tensors[1 + len(states) :], *rest)
            assert outputs[0].requires_grad, "autograd is off"  # or the gradients below would be zeros in silence
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
            # Cloned, since the gradients of the two biases are one tensor and an op's outputs must not alias.
            return [
                torch.zeros_like(leaf) if g is None else g.clone(memory_format=torch.contiguous_format)
                for leaf, g in zip(leaves, found, strict=True)
            ]

        def vjp_fake(grads: list[Tensor], wanted: list[bool], *inputs: Any) -> list[Tensor]:
            input, states, weights, *_ = inputs
            tensors = [input, *states, *weights]
            return [t.new_empty(t.shape) for t, w in zip(tensors, wanted, strict=True) if w]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
            input, states, weights, *rest = inputs
            ctx.counts = len(states), len(weights)
            # batch_sizes, the layout and what an op has besides, of which some are tensors
            ctx.rest = [None if isinstance(value, Tensor) else value for value in rest]
            ctx.places = [place for place, value in enumerate(rest) if isinstance(value, Tensor)]
            ctx.save_for_backward(input, *states, *weights, *(rest[place] for place in ctx.places))

        def backward(ctx: Any, grads: list[Tensor]) -> Any:
            count, weight_count = ctx.counts
            input, *tensors = ctx.saved_tensors
            states, weights = tensors[:count], tensors[count : count + weight_count]
            rest = list(ctx.rest)
            for place, value in zip(ctx.places, tensors[count + weight_count :], strict=True):
                rest[place] = value
            of_input, of_states, of_weights, *others = ctx.needs_input_grad
            wanted = [of_input, *of_states, *of_weights]
            found = iter(backward_op(grads, wanted, input, states, weights, *rest))
            flat = [next(found) if w else None for w in wanted]
            return flat[0], flat[1 : 1 + count], flat[1 + count :], *(None for _ in others)

        custom: Any = torch.library.custom_op(
            f"fastlm::{name}", forward, mutates_args=(), schema=f"({_ARGUMENTS}{extra}) -> Tensor[]"
        )
        custom.register_fake(fake)
        custom.register_autograd(backward, setup_context=setup)
        backward_op: Any = torch.library.custom_op(
            f"fastlm::{vjp_name}",
            vjp,
            mutates_args=(),
            schema=f"(Tensor[] grads, bool[] wanted, {_ARGUMENTS}{extra}) -> Tensor[]",
        )
        backward_op.register_fake(vjp_fake)
        return custom


def check_cell(
    op: str,
    gates: int,
    input: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    """Checks a cell's arguments. Raises ValueError naming the culprit."""
    if input.dim() != 2:
        raise ValueError(f"{op}: input is {describe(input)}, expected shape [B, I]")
    batch, width = input.shape
    hidden = states[0].shape[-1]
    rows = gates * hidden
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("w_ih", w_ih, (rows, width)),
        ("w_hh", w_hh, (rows, hidden)),
        ("b_ih", b_ih, (rows,)),
        ("b_hh", b_hh, (rows,)),
    ]
    wanted += [("hc"[i], state, (batch, hidden)) for i, state in enumerate(states)]
    for name, tensor, shape in wanted:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != input.dtype):
            expect_shape(op, name, tensor, shape)
            raise ValueError(f"{op}: {name} is {describe(tensor)}, the input {input.dtype}")
