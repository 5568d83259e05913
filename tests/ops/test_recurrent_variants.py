"""ops.lstm and ops.gru with layer normalisation, recurrent dropout and zoneout: native kernels and the reference."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from recurrent_cases import (
    SEQUENCES,
    Case,
    any_case,
    call,
    compare,
    faults,
    make_inputs,
    named_results,
    poisoned_memory,
    run_backend,
    run_layer,
)
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.ops.recurrent_variants import layer_by

implementation: Any = sys.modules["fastlm.ops.recurrent_variants"]
needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))
kernel = implementation.kernel
OPS = ("lstm_variant", "gru_variant")
# Normalisation of few units multiplies errors, and leaves next to nothing of the gradient of a single input's scale.
NORMALISED = {"floor": 1e-4, "least": 0.1}


def base(op: str, **variant: Any) -> Case:
    return Case(op=op, hidden=9, width=4, **variant)


def variants(op: str) -> list[Case]:
    found = [base(op, layer_norm=n, noise=noise) for n in (False, True) for noise in ("d", "hc", "e", "dhc")]
    return [*found, base(op, layer_norm=True)]


LAYOUTS = [
    {"steps": 1, "batch": 1, "hidden": 33, "width": 17},
    {"lengths": (5, 5, 3, 1), "bidirectional": True, "hidden": 17, "num_layers": 2},
    {"batch": 2, "steps": 3, "hidden": 70, "width": 40, "batch_first": True, "bias": False},
    {"batch": 140, "steps": 2, "hidden": 5},  # more rows than a chunk holds
    {"batch": 1, "steps": 140, "hidden": 5, "width": 2},  # more steps
]


def everything(op: str, **layout: Any) -> Case:
    return replace(base(op, layer_norm=True, noise="dhc"), **layout)


@needs_native
@pytest.mark.parametrize("case", [case for op in OPS for case in variants(op)], ids=str)
def test_native_agrees_at_every_level(case: Case, isa: str) -> None:
    with poisoned_memory():
        compare(case, run_backend("cpu"))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_native_agrees_in_every_layout(op: str, layout: dict[str, Any], norm: bool, isa: str) -> None:
    with poisoned_memory():
        compare(replace(everything(op, **layout), layer_norm=norm), run_backend("cpu"), floor=1e-5)


any_variant = strategies.sampled_from(OPS).flatmap(any_case)


@settings(max_examples=60, deadline=None)
@given(case=any_variant)
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call, **NORMALISED)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(case=any_variant)
def test_agrees_on_any_shape_at_length(case: Case) -> None:
    compare(case, call, **NORMALISED)


def _wrong_noise(noise: Any, fault: str) -> Any:
    mask, zoneout_h, zoneout_c = noise
    if fault == "shares of h and c swapped":
        return mask, zoneout_c, zoneout_h
    return {
        "no dropout": (None, zoneout_h, zoneout_c),
        "another row's mask": (mask.roll(1, 0), zoneout_h, zoneout_c),
        "no zoneout of h": (mask, None, zoneout_c),
        "shares a row late": (mask, zoneout_h.roll(1, 0), zoneout_c),
    }[fault]


NOISE_FAULTS = ["no dropout", "another row's mask", "no zoneout of h", "shares of h and c swapped", "shares a row late"]
FAULTS = [*faults(lambda *_: None), *NOISE_FAULTS, "gains swapped", "no bias of c"]  # type: ignore[arg-type, return-value]
OF_CELLS = ("shares of h and c swapped", "no bias of c")  # which a GRU has not


@needs_native
@pytest.mark.parametrize(
    ("op", "fault"), [(op, f) for op in OPS for f in FAULTS if op == "lstm_variant" or f not in OF_CELLS]
)
def test_the_comparison_refuses_faults(op: str, fault: str) -> None:
    """The comparison by which the kernel is judged, with the kernel spoiled."""
    right = layer_by(kernel)

    def spoiled(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, noise: Any) -> Any:
        if fault in NOISE_FAULTS:
            noise = type(noise)(*_wrong_noise(noise, fault))
        elif fault == "gains swapped":
            weights = weights._replace(ln_ih=weights.ln_hh, ln_hh=weights.ln_ih)
        else:
            weights = weights._replace(ln_c_bias=weights.ln_c_bias * 0)
        return right(input, sizes, states, weights, reverse, noise)

    case = everything(op, lengths=(5, 5, 3, 2), bidirectional=True)
    compare(case, run_layer(right))
    wrong = faults(right).get(fault, spoiled)
    with pytest.raises(AssertionError):
        compare(case, run_layer(wrong))


@needs_native
@pytest.mark.parametrize(("op", "index"), [(op, i) for op in OPS for i in range(11 if op == "lstm_variant" else 8)])
def test_the_comparison_refuses_a_wrong_gradient(op: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient of the kernel in turn, off by one part in a thousand."""
    right = kernel.layer_backward

    def wrong(*args: Any) -> Any:
        return [grad * 1.001 if at == index else grad for at, grad in enumerate(right(*args))]

    monkeypatch.setattr(kernel, "layer_backward", wrong)
    with pytest.raises(AssertionError):
        compare(everything(op), call)


@needs_native
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_rows_result_depends_on_no_other_row_and_on_no_thread(op: str, norm: bool) -> None:
    """Ragged or alone, on one thread or two: the same bits."""
    case = replace(everything(op, lengths=(9, 7, 7, 4, 1), bidirectional=True, hidden=150), layer_norm=norm)
    inputs = make_inputs(case).to(torch.float32)
    assert inputs.batch_sizes is not None
    mask, *shares = inputs.noise
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = named_results(case, inputs)
        torch.set_num_threads(2)
        two = named_results(case, inputs)
    finally:
        torch.set_num_threads(before)
    own = [
        name for name in one if not name.startswith("d_weight") and name != "d_input"
    ]  # the others are torch's sgemm
    assert all(torch.equal(one[name], two[name]) for name in own)
    starts = [0, *inputs.batch_sizes.cumsum(0).tolist()]
    for row, length in enumerate(case.lengths or ()):
        of_row = [starts[t] + row for t in range(length)]
        alone = replace(inputs, input=inputs.input[of_row][:, None], batch_sizes=None)
        alone.states = [s[:, row : row + 1] for s in inputs.states]
        alone.noise = [mask[:, row : row + 1], *(s[:, of_row] for s in shares)]  # type: ignore[index]
        with torch.no_grad():
            output, h_n, *_ = call(replace(case, lengths=None, steps=length, batch=1), alone)
        assert torch.equal(output[:, 0], one["output"][of_row])
        assert torch.equal(h_n[:, 0], one["h_n"][:, row])


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_saving_for_the_backward_changes_no_bit(op: str) -> None:
    for case in variants(op):
        inputs = make_inputs(case).to(torch.float32)
        with torch.no_grad():
            quiet = call(case, inputs)
        assert all(torch.equal(a, b) for a, b in zip(quiet, call(case, inputs), strict=True))


@pytest.mark.parametrize(
    "case",
    [case for op in OPS for case in (everything(op, lengths=(3, 2), num_layers=2), base(op, noise="e", bias=False))],
    ids=str,
)
def test_opcheck(case: Case) -> None:
    inputs = make_inputs(case).to(torch.float32)
    rest = (inputs.batch_sizes, case.num_layers, case.bidirectional, case.batch_first, case.bias, *case.extra)
    torch.library.opcheck(
        SEQUENCES[case.op].custom, (inputs.input, inputs.states, inputs.weights, *rest, *inputs.noise)
    )
    detached = (inputs.input.detach(), [s.detach() for s in inputs.states], [w.detach() for w in inputs.weights])
    wanted = [index % 3 != 1 for index in range(1 + len(inputs.states) + len(inputs.weights))]
    vjp = getattr(torch.ops.fastlm, f"{case.op}_vjp").default
    torch.library.opcheck(vjp, (inputs.grads, wanted, *detached, *rest, *inputs.noise))


def run_public(op: str, training: bool, seed: int = 0, **variant: Any) -> Tensor:
    torch.manual_seed(7)
    gates = 4 if op == "lstm" else 3
    x, h, c = torch.randn(6, 3, 4), torch.randn(1, 3, 20), torch.randn(1, 3, 20)
    weights = [
        torch.randn(gates * 20, 4),
        torch.randn(gates * 20, 20),
        torch.randn(gates * 20),
        torch.randn(gates * 20),
    ]
    weights += [torch.ones(size) for size in (gates * 20, gates * 20)] if "layer_norm" in variant else []
    weights += [torch.ones(20), torch.ones(20)] if "layer_norm" in variant and op == "lstm" else []
    torch.manual_seed(seed)
    hx: Any = (h, c) if op == "lstm" else h
    return getattr(ops, op)(x, hx, weights, training=training, **variant)[0]


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        ("lstm", {"recurrent_dropout": 0.5}),
        ("lstm", {"zoneout": (0.3, 0.0)}),
        ("lstm", {"zoneout": (0.0, 0.3)}),
        ("gru", {"recurrent_dropout": 0.5}),
        ("gru", {"zoneout": 0.3}),
    ],
    ids=str,
)
def test_noise_acts_in_training_alone_and_follows_the_seed(op: str, variant: dict[str, Any]) -> None:
    assert torch.equal(run_public(op, True, 1, **variant), run_public(op, True, 1, **variant))
    assert not torch.equal(run_public(op, True, 1, **variant), run_public(op, True, 2, **variant))
    assert torch.equal(run_public(op, False, 1, **variant), run_public(op, False, 2, **variant))
    assert torch.equal(run_public(op, False, **variant), run_public(op, False)) == ("recurrent_dropout" in variant)


@pytest.mark.parametrize(("op", "zoneout"), [("lstm", (0.2, 0.3)), ("gru", 0.2)])
def test_native_and_reference_draw_the_same(op: str, zoneout: Any) -> None:
    variant = {"layer_norm": True, "recurrent_dropout": 0.4, "zoneout": zoneout}
    found = run_public(op, True, **variant)
    with ops.backend("reference"):
        torch.testing.assert_close(found, run_public(op, True, **variant))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_zoneouts_expectation_is_the_mean_of_training_over_one_step(op: str) -> None:
    """Later steps are not linear in the state."""
    gates, zoneout = (4, (0.2, 0.4)) if op == "lstm" else (3, 0.2)
    x, h, c = torch.randn(1, 20_000, 3), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    weights = [torch.randn(gates * 2, 3), torch.randn(gates * 2, 2), torch.randn(gates * 2), torch.randn(gates * 2)]
    states = tuple(s.expand(1, 20_000, 2).contiguous() for s in (h, c))
    x = x[:, :1].expand_as(x).contiguous()
    hx: Any = states if op == "lstm" else states[0]
    trained, calm = (getattr(ops, op)(x, hx, weights, zoneout=zoneout, training=t)[1] for t in (True, False))
    for mean, expected in zip(*((final if op == "lstm" else (final,)) for final in (trained, calm)), strict=True):
        torch.testing.assert_close(mean.mean(1), expected[:, 0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("op", "variant", "message"),
    [
        ("lstm", {"recurrent_dropout": 1.5}, r"^lstm: recurrent_dropout is 1\.5, expected a probability"),
        ("lstm", {"zoneout": (0.0, -0.1)}, r"^lstm: zoneout is -0\.1, expected a probability"),
        ("gru", {"recurrent_dropout": 1.5}, r"^gru: recurrent_dropout is 1\.5, expected a probability"),
        ("gru", {"zoneout": -0.1}, r"^gru: zoneout is -0\.1, expected a probability"),
    ],
)
def test_errors_name_the_culprit(op: str, variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_public(op, True, **variant)


@pytest.mark.parametrize(("op", "count", "gains"), [("lstm_variant", 8, 9), ("gru_variant", 6, 27)])
def test_errors_of_weights_and_states(op: str, count: int, gains: int) -> None:
    inputs = make_inputs(everything(op))
    with pytest.raises(ValueError, match=rf"^{op}: weights has {count - 1} tensors, expected {count}"):
        call(everything(op), replace(inputs, weights=inputs.weights[:-1]))
    last = [*inputs.weights[:-1], inputs.weights[-1][:-1]]
    with pytest.raises(
        ValueError, match=rf"^{op}: weights\[{count - 1}\] is float64 \[{gains - 1}\] .*expected shape \[{gains}\]"
    ):
        call(everything(op), replace(inputs, weights=last))
    with pytest.raises(ValueError, match=rf"^{op}: h0 is float64 \[3, 9\]"):
        call(everything(op), replace(inputs, states=[inputs.states[0][0], *inputs.states[1:]]))
    for index, name in enumerate(("dropout_mask", "zoneout_h", "zoneout_c")[: len(inputs.noise)]):
        noise = list(inputs.noise)
        noise[index] = noise[index][:, 1:]  # type: ignore[index]
        with pytest.raises(ValueError, match=rf"^{op}: {name} is float64 \[1, \d+, 9\] .*expected shape"):
            call(everything(op), replace(inputs, noise=noise))


@needs_native
def test_a_projection_is_the_references() -> None:
    case = everything("lstm_variant", proj_size=3)
    compare(case, call)
    inputs = make_inputs(case).to(torch.float32)
    with ops.backend("cpu"), pytest.raises(NotImplementedError, match="projection"):
        call(case, inputs)
