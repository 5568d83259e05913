"""Cases for the recurrent ops, and how to run one: outputs and every gradient, for any dtype, backend or fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies
from tolerance import assert_close_to_reference
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_sequence

from fastlm import ops
from fastlm.ops.gru import GRU
from fastlm.ops.lstm import LSTM
from fastlm.ops.recurrent import SequenceOp
from fastlm.ops.recurrent_variants import GRU_VARIANT, LSTM_VARIANT
from fastlm.ops.rnn import RNN
from fastlm.reference import gru, lstm, rnn
from fastlm.reference.recurrent import Layer, Noise, sequence

SEQUENCES: dict[str, SequenceOp] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
SEQUENCES |= {"lstm_variant": LSTM_VARIANT, "gru_variant": GRU_VARIANT}
REFERENCES: dict[str, Any] = {"lstm": lstm.lstm, "gru": gru.gru, "rnn": rnn.rnn}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class Case:
    op: str = "lstm"
    steps: int = 5
    batch: int = 3
    width: int = 6
    hidden: int = 7
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    proj_size: int = 0
    lengths: tuple[int, ...] | None = None  # packed input with rows of these lengths
    nonlinearity: str = "tanh"
    layer_norm: bool = False  # these two of ops "lstm_variant" and "gru_variant"
    noise: str = ""  # d: dropout, h: zoneout of h, c: of c (which a GRU has not), e: zoneout's expectation

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def cell(self) -> str:
        return self.op.removesuffix("_variant")

    @property
    def variant(self) -> bool:
        return self.op != self.cell

    @property
    def extra(self) -> tuple[Any, ...]:
        return (self.layer_norm,) if self.variant else (self.nonlinearity,) if self.op == "rnn" else ()

    @property
    def states(self) -> int:
        return 2 if self.cell == "lstm" else 1

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the public op."""
        wanted = {"num_layers": self.num_layers, "bidirectional": self.bidirectional, "bias": self.bias}
        wanted["batch_first"] = self.batch_first
        if self.states == 2:
            wanted["proj_size"] = self.proj_size
        if self.variant:
            wanted["layer_norm"] = self.layer_norm
        return wanted | ({"nonlinearity": self.nonlinearity} if self.op == "rnn" else {})

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k))


@dataclass
class Inputs:
    """A case's tensors in float64, and the gradients that flow into its outputs."""

    input: Tensor
    states: list[Tensor]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    grads: list[Tensor]
    noise: list[Tensor | None] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype).requires_grad_() for t in tensors]

        (x,) = cast([self.input])
        noise = [None if n is None else n.to(dtype) for n in self.noise]
        grads = [g.to(dtype) for g in self.grads]
        return Inputs(x, cast(self.states), cast(self.weights), self.batch_sizes, grads, noise)


def make_inputs(case: Case) -> Inputs:
    """Random inputs, large enough that gates saturate now and then."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    gates, hidden, out = GATES[case.cell], case.hidden, case.proj_size or case.hidden
    weights = []
    width = case.width
    for _ in range(case.num_layers):
        for _ in range(case.directions):
            weights += [normal(gates * hidden, width) / width**0.5, normal(gates * hidden, out) / out**0.5]
            weights += [normal(gates * hidden), normal(gates * hidden)] if case.bias else []
            weights += [normal(case.proj_size, hidden) / hidden**0.5] if case.proj_size else []
            if case.layer_norm:
                sizes = (gates * hidden, gates * hidden, hidden)
                weights += [1 + normal(size) / 4 for size in sizes[: 1 + case.states]]
                weights += [normal(hidden) / 4] if case.bias and case.states == 2 else []
        width = out * case.directions
    batch_sizes = None
    if case.lengths is None:
        batch = case.batch
        x = normal(batch, case.steps, case.width) if case.batch_first else normal(case.steps, batch, case.width)
    else:
        batch = len(case.lengths)
        packed = pack_sequence([normal(length, case.width) for length in sorted(case.lengths, reverse=True)])
        x, batch_sizes = packed.data, packed.batch_sizes
    states = [normal(case.num_layers * case.directions, batch, size) for size in (out, hidden)[: case.states]]
    grads = [normal(*x.shape[:-1], out * case.directions), *(normal(*s.shape) for s in states)]
    return Inputs(x, states, weights, batch_sizes, grads, _noise(case, states, x.shape[:-1].numel()))


def _noise(case: Case, states: list[Tensor], rows: int) -> list[Tensor | None]:
    """The mask and shares of a variant. Shares are anything from 0 to 1, which no error in them hides behind."""
    if not case.variant:
        return []

    def shares(letter: str, state: Tensor) -> Tensor | None:
        size = (state.shape[0], rows, state.shape[2])
        if "e" in case.noise:
            return torch.full((), 0.3, dtype=torch.float64).expand(size)
        return torch.rand(size, dtype=torch.float64) if letter in case.noise else None

    mask = torch.randint(0, 2, states[0].shape).double() * 1.5 if "d" in case.noise else None
    return [mask, *(shares(letter, state) for letter, state in zip("hc", states, strict=False))]


Run = Callable[[Case, Inputs], list[Tensor]]


def call(case: Case, inputs: Inputs) -> list[Tensor]:
    """[output, *states] of the public op; of a variant with the noise that is given."""
    hx = tuple(inputs.states) if case.states == 2 else inputs.states[0]
    function = getattr(ops, case.op)
    noise = dict(zip(("dropout_mask", "zoneout_h", "zoneout_c"), inputs.noise, strict=False))
    output, final = function(inputs.input, hx, inputs.weights, batch_sizes=inputs.batch_sizes, **case.kwargs(), **noise)
    return [output, *(final if case.states == 2 else (final,))]


def run_reference(case: Case, inputs: Inputs) -> list[Tensor]:
    """[output, *states] of fastlm.reference."""
    layout = (case.num_layers, case.bidirectional, case.batch_first, case.bias)
    output, states = REFERENCES[case.cell](
        inputs.input, tuple(inputs.states), inputs.weights, inputs.batch_sizes, *layout, 0.0, *case.extra, *inputs.noise
    )
    return [output, *states]


def run_layer(layer: Layer) -> Run:
    """Runs an LSTM or a GRU of the given layers."""

    def run(case: Case, inputs: Inputs) -> list[Tensor]:
        layout = (case.num_layers, case.bidirectional, case.batch_first, case.bias)
        output, states = sequence(
            layer, inputs.input, tuple(inputs.states), inputs.weights, inputs.batch_sizes, *layout, 0.0,
            case.layer_norm, Noise(*inputs.noise),
        )  # fmt: skip
        return [output, *states]

    return run


def run_torch(case: Case, inputs: Inputs) -> list[Tensor]:
    """[output, *states] of torch's operator, called here by hand so that nothing of fastlm is in the way.

    Of variants, which torch has not, the reference's.
    """
    if case.variant:
        return run_reference(case, inputs)
    function = {"lstm": _VF.lstm, "gru": _VF.gru, "rnn": getattr(_VF, f"rnn_{case.nonlinearity}")}[case.op]
    hx = inputs.states if case.op == "lstm" else inputs.states[0]
    options = (inputs.weights, case.bias, case.num_layers, 0.0, False, case.bidirectional)
    if inputs.batch_sizes is None:
        return list(function(inputs.input, hx, *options, case.batch_first))
    return list(function(inputs.input, inputs.batch_sizes, hx, *options))


def run_backend(name: str) -> Run:
    """[output, *states] of the public op under `ops.backend(name)`."""

    def run(case: Case, inputs: Inputs) -> list[Tensor]:
        with ops.backend(name):
            return call(case, inputs)

    return run


def named_results(case: Case, inputs: Inputs, run: Run = call) -> dict[str, Tensor]:
    """Outputs by name and, for inputs that want them, gradients."""
    outputs = run(case, inputs)
    names = ["output", "h_n", "c_n"][: len(outputs)]
    results = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    leaves = {"d_input": inputs.input} | {f"d_state{i}": s for i, s in enumerate(inputs.states)}
    leaves |= {f"d_weight{i}": w for i, w in enumerate(inputs.weights)}
    found = torch.autograd.grad(outputs, list(leaves.values()), inputs.grads)
    return results | dict(zip(leaves, found, strict=True))


def inference(case: Case, inputs: Inputs, run: Run = call) -> dict[str, Tensor]:
    """Outputs by name, with no gradient recorded: another path through the implementations."""
    with torch.no_grad():
        return dict(zip(["output", "h_n", "c_n"], run(case, inputs), strict=False))


def compare(
    case: Case, fast: Run, *, floor: float = 1e-6, least: float = 0.0, dtype: torch.dtype = torch.float32
) -> None:
    """Asserts the design's bound for every output and gradient of `fast` in `dtype`, with and without gradients.

    Over thousands of random cases a floor of 1e-6 would fail a few: among a handful of numbers whose terms cancel,
    torch is sometimes lucky. Those pass 1e-5; a fault is off by a hundred times more at least. The floor is relative to
    the result's magnitude or to `least`, whichever is greater.
    """
    single = make_inputs(case).to(dtype)
    exact = named_results(case, single.to(torch.float64), run_reference)
    same_dtype = named_results(case, single, run_torch)
    for results in (named_results(case, single, fast), inference(case, single, fast)):
        for name, result in results.items():
            magnitude = float(exact[name].abs().max()) if exact[name].numel() else 0.0
            relative = floor * max(1.0, least / magnitude) if magnitude else floor
            try:
                assert_close_to_reference(result, same_dtype[name], exact[name], floor=relative)
            except AssertionError as error:
                raise AssertionError(f"{case}: {name}: {error}") from None


def faults(layer: Layer) -> dict[str, Layer]:
    """Wrong layers of the kinds a kernel could be: each must be refused by the comparison."""

    def swapped_gates(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        def swap(w: Tensor | None) -> Tensor | None:
            if w is None:
                return None
            chunks = list(w.chunk(w.shape[0] // states[-1].shape[-1]))
            return torch.cat([chunks[1], chunks[0], *chunks[2:]])

        swapped = type(weights)(*map(swap, weights[:4]), *weights[4:])
        return layer(input, sizes, states, swapped, reverse, *rest)

    def ignores_reverse(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        return layer(input, sizes, states, weights, False, *rest)

    def row_ends_late(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        # The rows are the same in number, but one that should have ended runs in place of the next step's first.
        late = next(t for t in range(1, len(sizes)) if sizes[t] < sizes[t - 1] and sizes[t] > 1)
        wrong = [*sizes]
        wrong[late] += 1
        wrong[-1] -= 1
        return layer(input, [s for s in wrong if s], states, weights, reverse, *rest)

    def forgets_bias(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        return layer(input, sizes, states, weights._replace(b_hh=weights.b_hh * 0), reverse, *rest)

    def zeros(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        output, final = layer(input, sizes, states, weights, reverse, *rest)
        return output * 0, tuple(s * 0 for s in final)

    def stale_state(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        output, final = layer(input, sizes, states, weights, reverse, *rest)
        return output, (*final[:-1], states[-1] + 0 * final[-1])

    def drops_gradient(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, *rest: Any) -> Any:
        return layer(input, sizes, tuple(s.detach() + 0 * s for s in states), weights, reverse, *rest)

    wrong = (swapped_gates, ignores_reverse, row_ends_late, forgets_bias, zeros, stale_state, drops_gradient)
    return {fault.__name__: fault for fault in wrong}


def case_for_fault(op: str, fault: str) -> Case:
    """A case in which the fault makes a difference."""
    case = Case(op=op, bidirectional=fault == "ignores_reverse")
    return replace(case, lengths=(5, 5, 3, 2)) if fault == "row_ends_late" else case


def cases(op: str) -> list[Case]:
    """The grid that every implementation is held to. Hidden sizes around the widths of vectors."""
    base = Case(op=op)
    found = [
        base,
        replace(base, steps=1, batch=1, hidden=33, width=17),
        replace(base, steps=1, batch=4, hidden=16, num_layers=2),
        replace(base, steps=1, batch=2, hidden=9, batch_first=True, bias=False),
        replace(base, steps=9, batch=1, hidden=8),
        replace(base, bias=False, batch_first=True),
        replace(base, num_layers=3, bidirectional=True, hidden=19),
        replace(base, bidirectional=True, batch_first=True, num_layers=2, bias=False, hidden=4),
        replace(base, lengths=(5, 5, 3, 1), hidden=17),
        replace(base, lengths=(6, 2, 1), bidirectional=True, num_layers=2, bias=False),
        replace(base, lengths=(1,), hidden=1, width=1),
        replace(base, steps=2, batch=9, hidden=40, width=3),
    ]
    if op == "lstm":
        found += [
            replace(base, proj_size=3),
            replace(base, proj_size=2, steps=1, bias=False),
            replace(base, proj_size=5, num_layers=2, bidirectional=True, hidden=18, batch_first=True),
            replace(base, proj_size=1, lengths=(4, 2, 2), bidirectional=True, bias=False),
        ]
    if op == "rnn":
        found += [replace(case, nonlinearity="relu") for case in found]
    return found


@strategies.composite
def any_case(draw: Any, op: str) -> Case:
    """Any shape, layout and variant."""
    variant = op.endswith("_variant")
    layer_norm = variant and draw(strategies.booleans())
    # Where the variance of a few units nears zero, normalisation makes of any error anything.
    hidden = draw(strategies.integers(8 if layer_norm else 1, 40))
    lengths = draw(strategies.none() | strategies.lists(strategies.integers(1, 6), min_size=1, max_size=6))
    return Case(
        op=op,
        steps=draw(strategies.integers(1, 6)),
        batch=draw(strategies.integers(1, 6)),
        width=draw(strategies.integers(2 if layer_norm else 1, 20)),
        hidden=hidden,
        num_layers=draw(strategies.integers(1, 2)),
        bidirectional=draw(strategies.booleans()),
        batch_first=draw(strategies.booleans()),
        bias=draw(strategies.booleans()),
        proj_size=draw(strategies.integers(0, min(hidden - 1, 9))) if op == "lstm" else 0,
        lengths=None if lengths is None else tuple(lengths),
        layer_norm=layer_norm,
        noise=draw(strategies.sampled_from(["", "d", "h", "c", "e", "dhc"])) if variant else "",
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element which a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
