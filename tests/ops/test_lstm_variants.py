"""ops.lstm with layer normalisation, recurrent dropout and zoneout: the native kernel against the reference."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from recurrent_cases import (
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
from fastlm.ops.lstm_variants import LSTM_VARIANT

implementation: Any = sys.modules["fastlm.ops.lstm_variants"]
needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))
BASE = Case(op="lstm_variant", hidden=9, width=4)
# Normalisation of few units multiplies errors, and leaves next to nothing of the gradient of a single input's scale.
NORMALISED = {"floor": 1e-4, "least": 0.1}
VARIANTS = [replace(BASE, layer_norm=n, noise=noise) for n in (False, True) for noise in ("d", "hc", "e", "dhc")]
VARIANTS.append(replace(BASE, layer_norm=True))
LAYOUTS = [
    {"steps": 1, "batch": 1, "hidden": 33, "width": 17},
    {"lengths": (5, 5, 3, 1), "bidirectional": True, "hidden": 17, "num_layers": 2},
    {"batch": 2, "steps": 3, "hidden": 70, "width": 40, "batch_first": True, "bias": False},
    {"batch": 140, "steps": 2, "hidden": 5},  # more rows than a chunk holds
    {"batch": 1, "steps": 140, "hidden": 5, "width": 2},  # more steps
]


def everything(**layout: Any) -> Case:
    return replace(BASE, layer_norm=True, noise="dhc", **layout)


@needs_native
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_native_agrees_at_every_level(case: Case, isa: str) -> None:
    with poisoned_memory():
        compare(case, run_backend("cpu"))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_native_agrees_in_every_layout(layout: dict[str, Any], norm: bool, isa: str) -> None:
    with poisoned_memory():
        compare(replace(everything(**layout), layer_norm=norm), run_backend("cpu"), floor=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=any_case("lstm_variant"))
def test_agrees_on_any_shape(case: Case) -> None:
    compare(case, call, **NORMALISED)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(case=any_case("lstm_variant"))
def test_agrees_on_any_shape_at_length(case: Case) -> None:
    compare(case, call, **NORMALISED)


def _wrong_noise(noise: Any, fault: str) -> Any:
    mask, zoneout_h, zoneout_c = noise
    return {
        "no dropout": (None, zoneout_h, zoneout_c),
        "another row's mask": (mask.roll(1, 0), zoneout_h, zoneout_c),
        "no zoneout of h": (mask, None, zoneout_c),
        "shares of h and c swapped": (mask, zoneout_c, zoneout_h),
        "shares a row late": (mask, zoneout_h.roll(1, 0), zoneout_c),
    }[fault]


NOISE_FAULTS = ["no dropout", "another row's mask", "no zoneout of h", "shares of h and c swapped", "shares a row late"]


@needs_native
@pytest.mark.parametrize("fault", [*faults(lambda *_: None), *NOISE_FAULTS, "gains swapped", "no bias of c"])  # type: ignore[arg-type, return-value]
def test_the_comparison_refuses_faults(fault: str) -> None:
    """The comparison by which the kernel is judged, with the kernel spoiled."""
    right = implementation._cpu_layer

    def spoiled(input: Any, sizes: Any, states: Any, weights: Any, reverse: bool, noise: Any) -> Any:
        if fault in NOISE_FAULTS:
            noise = type(noise)(*_wrong_noise(noise, fault))
        elif fault == "gains swapped":
            weights = weights._replace(ln_ih=weights.ln_hh, ln_hh=weights.ln_ih)
        else:
            weights = weights._replace(ln_c_bias=weights.ln_c_bias * 0)
        return right(input, sizes, states, weights, reverse, noise)

    case = everything(lengths=(5, 5, 3, 2), bidirectional=True)
    compare(case, run_layer(right))
    wrong = faults(right).get(fault, spoiled)
    with pytest.raises(AssertionError):
        compare(case, run_layer(wrong))


@needs_native
@pytest.mark.parametrize("index", range(11))
def test_the_comparison_refuses_a_wrong_gradient(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient of the kernel in turn, off by one part in a thousand."""
    right = implementation.kernel.layer_backward

    def wrong(*args: Any) -> Any:
        return [grad * 1.001 if at == index else grad for at, grad in enumerate(right(*args))]

    monkeypatch.setattr(implementation.kernel, "layer_backward", wrong)
    with pytest.raises(AssertionError):
        compare(everything(), call)


@needs_native
@pytest.mark.parametrize("norm", [False, True])
def test_a_rows_result_depends_on_no_other_row_and_on_no_thread(norm: bool) -> None:
    """Ragged or alone, on one thread or two: the same bits."""
    case = replace(everything(lengths=(9, 7, 7, 4, 1), bidirectional=True, hidden=150), layer_norm=norm)
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
            output, h_n, _ = call(replace(case, lengths=None, steps=length, batch=1), alone)
        assert torch.equal(output[:, 0], one["output"][of_row])
        assert torch.equal(h_n[:, 0], one["h_n"][:, row])


@needs_native
def test_saving_for_the_backward_changes_no_bit() -> None:
    for case in VARIANTS:
        inputs = make_inputs(case).to(torch.float32)
        with torch.no_grad():
            quiet = call(case, inputs)
        assert all(torch.equal(a, b) for a, b in zip(quiet, call(case, inputs), strict=True))


@pytest.mark.parametrize(
    "case", [everything(lengths=(3, 2), num_layers=2), replace(BASE, noise="e", bias=False)], ids=str
)
def test_opcheck(case: Case) -> None:
    inputs = make_inputs(case).to(torch.float32)
    rest = (inputs.batch_sizes, case.num_layers, case.bidirectional, case.batch_first, case.bias, *case.extra)
    torch.library.opcheck(LSTM_VARIANT.custom, (inputs.input, inputs.states, inputs.weights, *rest, *inputs.noise))
    detached = (inputs.input.detach(), [s.detach() for s in inputs.states], [w.detach() for w in inputs.weights])
    wanted = [index % 3 != 1 for index in range(3 + len(inputs.weights))]
    vjp = torch.ops.fastlm.lstm_variant_vjp.default
    torch.library.opcheck(vjp, (inputs.grads, wanted, *detached, *rest, *inputs.noise))


def run_public(training: bool, seed: int = 0, **variant: Any) -> Tensor:
    torch.manual_seed(7)
    x, h, c = torch.randn(6, 3, 4), torch.randn(1, 3, 20), torch.randn(1, 3, 20)
    weights = [torch.randn(80, 4), torch.randn(80, 20), torch.randn(80), torch.randn(80)]
    weights += [torch.ones(80), torch.ones(80), torch.ones(20), torch.zeros(20)] if variant.get("layer_norm") else []
    torch.manual_seed(seed)
    return ops.lstm(x, (h, c), weights, training=training, **variant)[0]


@pytest.mark.parametrize(
    "variant", [{"recurrent_dropout": 0.5}, {"zoneout": (0.3, 0.0)}, {"zoneout": (0.0, 0.3)}], ids=str
)
def test_noise_acts_in_training_alone_and_follows_the_seed(variant: dict[str, Any]) -> None:
    assert torch.equal(run_public(True, 1, **variant), run_public(True, 1, **variant))
    assert not torch.equal(run_public(True, 1, **variant), run_public(True, 2, **variant))
    assert torch.equal(run_public(False, 1, **variant), run_public(False, 2, **variant))
    assert torch.equal(run_public(False, **variant), run_public(False)) == ("recurrent_dropout" in variant)


def test_native_and_reference_draw_the_same() -> None:
    variant = {"layer_norm": True, "recurrent_dropout": 0.4, "zoneout": (0.2, 0.3)}
    found = run_public(True, **variant)
    with ops.backend("reference"):
        torch.testing.assert_close(found, run_public(True, **variant))


def test_zoneouts_expectation_is_the_mean_of_training_over_one_step() -> None:
    """Later steps are not linear in the state."""
    x, h, c = torch.randn(1, 20_000, 3), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    weights = [torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
    states = tuple(s.expand(1, 20_000, 2).contiguous() for s in (h, c))
    x = x[:, :1].expand_as(x).contiguous()
    trained, calm = (ops.lstm(x, states, weights, zoneout=(0.2, 0.4), training=t)[1] for t in (True, False))  # type: ignore[arg-type]
    for mean, expected in zip(trained, calm, strict=True):
        torch.testing.assert_close(mean.mean(1), expected[:, 0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"recurrent_dropout": 1.5}, r"^lstm: recurrent_dropout is 1\.5, expected a probability"),
        ({"zoneout": (0.0, -0.1)}, r"^lstm: zoneout is -0\.1, expected a probability"),
    ],
)
def test_errors_name_the_culprit(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_public(True, **variant)


def test_errors_of_weights_and_states() -> None:
    inputs = make_inputs(everything())
    with pytest.raises(ValueError, match=r"^lstm_variant: weights has 7 tensors, expected 8"):
        call(everything(), replace(inputs, weights=inputs.weights[:-1]))
    gains = [*inputs.weights[:6], inputs.weights[6][:-1], inputs.weights[7]]
    with pytest.raises(ValueError, match=r"^lstm_variant: weights\[6\] is float64 \[8\] .*expected shape \[9\]"):
        call(everything(), replace(inputs, weights=gains))
    with pytest.raises(ValueError, match=r"^lstm_variant: h0 is float64 \[3, 9\]"):
        ops.lstm(inputs.input, (inputs.states[0][0], inputs.states[1]), inputs.weights, layer_norm=True)
    for index, name in enumerate(("dropout_mask", "zoneout_h", "zoneout_c")):
        noise = list(inputs.noise)
        noise[index] = noise[index][:, 1:]  # type: ignore[index]
        with pytest.raises(ValueError, match=rf"^lstm_variant: {name} is float64 \[1, \d+, 9\] .*expected shape"):
            call(everything(), replace(inputs, noise=noise))


@needs_native
def test_a_projection_is_the_references() -> None:
    case = everything(proj_size=3)
    compare(case, call)
    inputs = make_inputs(case).to(torch.float32)
    with ops.backend("cpu"), pytest.raises(NotImplementedError, match="projection"):
        call(case, inputs)
