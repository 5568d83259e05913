"""Variants of LSTM and GRU with eight rows and more, whose products are made of digits where there are tiles."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from recurrent_cases import Case, any_case, call, compare, make_inputs, named_results, poisoned_memory, run_backend
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native, packing

kernel: Any = sys.modules["fastlm.ops.recurrent_variants"].kernel
pytestmark = [
    pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error)),
    pytest.mark.skipif(native.CPU.module is not None and not packing.digit_tiles(), reason="there are no tiles"),
]
OPS = ("lstm_variant", "gru_variant")
NOISES = ("", "d", "hc", "e", "dhc")
RAGGED = (5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 2, 2, 1, 1, 1)
CPU = run_backend("cpu")


def case_of(op: str, **options: Any) -> Case:
    return Case(**{"op": op, "batch": 18, "hidden": 40, "width": 12, **options})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each forward pass chose digits."""
    answers: list[bool] = []
    right = kernel.recurrent_digits.in_digits

    def in_digits(*args: Any) -> bool:
        answers.append(right(*args))
        return answers[-1]

    monkeypatch.setattr(kernel.recurrent_digits, "in_digits", in_digits)
    return answers


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("op", OPS)
def test_agrees(op: str, noise: str, norm: bool, asked: list[bool]) -> None:
    layouts: list[dict[str, Any]] = [
        {},
        {"lengths": RAGGED, "bidirectional": True, "num_layers": 2, "hidden": 17, "bias": False},
        {"batch": 9, "steps": 70, "hidden": 33},  # more rows than a chunk holds
    ]
    for layout in layouts:
        with poisoned_memory():
            # Normalisation of few units multiplies errors, floats' too.
            compare(case_of(op, noise=noise, layer_norm=norm, **layout), CPU, floor=1e-4 if norm else 1e-5, least=0.1)
    assert asked and all(asked)


@settings(max_examples=40, deadline=None)
@given(
    case=strategies.sampled_from(OPS).flatmap(any_case),
    batch=strategies.integers(8, 36),
    lengths=strategies.none() | strategies.lists(strategies.integers(1, 6), min_size=8, max_size=36),
)
def test_agrees_on_any_shape(case: Case, batch: int, lengths: list[int] | None) -> None:
    case = replace(case, batch=batch, lengths=None if lengths is None else tuple(lengths))
    compare(case, CPU, floor=1e-4, least=0.1)


@pytest.mark.parametrize("what", ["small gains", "large masks", "large states", "small states"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_states_of_any_size(op: str, norm: bool, what: str) -> None:
    """m h may be far beyond 1, or far below it where normalisation divides by just that: the error stays near floats'.

    Where some of a row are a hundred times the others, whose units they decide, it is up to ten times that.
    """
    torch.manual_seed(3)
    case = case_of(op, noise="d", layer_norm=norm, hidden=64)
    inputs = make_inputs(case)
    if what == "small gains":
        inputs.weights = [w * 1e-3 if w.dim() == 1 and len(w) == case.hidden else w for w in inputs.weights]
    elif what == "large masks":
        inputs.noise[0] = inputs.noise[0] * 100  # type: ignore[operator]
    else:
        inputs.states[0] = inputs.states[0] * (100 if what == "large states" else 1e-4)
    with torch.no_grad():
        exact = call(case, inputs.to(torch.float64))
        found = CPU(case, inputs.to(torch.float32))
        floats = run_backend("reference")(case, inputs.to(torch.float32))
    for fast, same, want in zip(found, floats, exact, strict=True):
        assert_close_to_reference(fast, same, want, factor=20.0 if "large" in what else 3.0)


@pytest.mark.parametrize("what", ["small inputs", "one large feature"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_inputs_of_any_size(op: str, norm: bool, what: str) -> None:
    """Normalisation divides W_ih x by its size, however small; one feature must not decide what is left of others."""
    torch.manual_seed(4)
    case = case_of(op, layer_norm=norm, hidden=64, width=50)
    inputs = make_inputs(case)
    if what == "small inputs":
        inputs.input = inputs.input * 0.02  # eps is still small beside the variance
    else:
        inputs.input[..., 3] *= 1e4
        for weight in inputs.weights[:1]:
            weight[:, 3] /= 1e4
    with torch.no_grad():
        exact = call(case, inputs.to(torch.float64))
        found = CPU(case, inputs.to(torch.float32))
        floats = run_backend("reference")(case, inputs.to(torch.float32))
    for fast, same, want in zip(found, floats, exact, strict=True):
        assert_close_to_reference(fast, same, want, factor=3.0)


@pytest.mark.parametrize("noise", ["d", "dhc"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_bits_depend_on_the_row_alone(op: str, norm: bool, noise: str) -> None:
    case = case_of(op, noise=noise, layer_norm=norm, steps=7, hidden=150, batch=21)
    inputs = make_inputs(case).to(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(named_results(case, inputs))
    finally:
        torch.set_num_threads(before)
    for name in ("output", "h_n", "d_state0"):
        assert torch.equal(results[0][name], results[1][name]) and torch.equal(results[0][name], results[2][name])
    mask, *shares = inputs.noise
    for low, high in ((0, 8), (4, 13), (3, 20)):
        part = replace(inputs, input=inputs.input[:, low:high], states=[s[:, low:high] for s in inputs.states])
        of_row = [s if s is None else s.view(1, 7, 21, -1)[:, :, low:high].flatten(1, 2) for s in shares]
        part.noise = [mask[:, low:high], *of_row]  # type: ignore[index]
        with torch.no_grad():
            output, h_n, *_ = CPU(replace(case, batch=high - low), part)
        assert torch.equal(output, results[0]["output"][:, low:high])
        assert torch.equal(h_n, results[0]["h_n"][:, low:high])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op: str, norm: bool) -> None:
    case = case_of(op, noise="d", layer_norm=norm)
    inputs = make_inputs(case).to(torch.float32)
    with torch.no_grad():
        clean = CPU(case, inputs)[0]
        inputs.input[2, 7] = float("nan")
        found = CPU(case, inputs)[0]
    assert found[2:, 7].isnan().all()
    found[2:, 7] = clean[2:, 7]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_float32_rounded_at_the_end(op: str, norm: bool, asked: list[bool]) -> None:
    case = case_of(op, noise="dhc", layer_norm=norm)
    inputs = make_inputs(case).to(torch.bfloat16)
    narrow = named_results(case, inputs, CPU)
    wide = named_results(case, inputs.to(torch.float32), CPU)
    assert asked and all(asked)
    for name, result in wide.items():
        assert torch.equal(narrow[name], result.bfloat16()), name


def _two_digits(weight: Tensor, dim: int) -> Tensor:
    unit = weight.detach().abs().amax(dim, keepdim=True) / 0x7F00
    return (weight.detach() / unit).round() * unit


@pytest.mark.parametrize("fault", ["forward", "gradients"])
@pytest.mark.parametrize("op", OPS)
def test_the_comparison_refuses_a_lost_digit(op: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(op, noise="dhc")
    compare(case, CPU)
    if fault == "forward":
        right = kernel._packed
        monkeypatch.setattr(
            kernel,
            "_packed",
            lambda weights, *rest: right([weights[0], _two_digits(weights[1], 1), *weights[2:]], *rest),
        )
    else:
        module = kernel.recurrent_digits
        columns = module.columns_in_digits(3 if op == "gru_variant" else 4)
        monkeypatch.setattr(module, "columns_in_digits", lambda _: lambda weight: columns(_two_digits(weight, 0)))
    with ops.backend("cpu"), pytest.raises(AssertionError):
        compare(case, CPU)
