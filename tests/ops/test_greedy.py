"""`ops.greedy` with a screen: the very token of the full product, and bounds that hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu.greedy import coarsen
from fastlm.ops.greedy import Screen, _bounded
from fastlm.ops.quantized import QuantizedTensor
from fastlm.reference import greedy as reference
from fastlm.reference.sample import BadLogits

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason="no native kernels")

KINDS = ("Q8_0", "F16", "BF16", "F32")
Weight = Tensor | QuantizedTensor


def inputs(rows: int, columns: int, *, far: float = 5.0) -> Tensor:
    """Hidden states as models have them: a few directions count for most."""
    main = torch.randn(4, columns)
    return torch.randn(rows, columns) + far * torch.randn(rows, 4) @ main


def outputs(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return torch.stack([ops.linear(row[None, None], weight, bias)[0, 0] for row in x])


def check(x: Tensor, weight: Weight, bias: Tensor | None, screen: Screen) -> None:
    """Tokens and bounds of rows together and alone."""
    wanted = outputs(x, weight, bias)
    tokens, bounds, refused = _bounded(x[:, None], screen)
    assert refused < 0
    assert torch.equal(tokens[:, 0], reference.largest(wanted))
    assert bool((~(bounds < wanted)).all())
    assert torch.equal(ops.greedy(x[:1, None], weight, bias, screen=screen)[0], tokens[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from((*KINDS, None)),
    rows=st.integers(1, 9),
    outs=st.integers(1, 70),
    blocks=st.integers(1, 5),
    seen=st.integers(1, 60),
    biased=st.booleans(),
    log_weight=st.integers(-12, 3),
    log_input=st.integers(-12, 8),
)
def test_token_is_that_of_the_full_product(
    seed: int, kind: str | None, rows: int, outs: int, blocks: int, seen: int, biased: bool, log_weight: int,
    log_input: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    dense = torch.randn(outs, 32 * blocks) * 10.0**log_weight * torch.randn(outs, 1).exp()
    weight = dense if kind is None else QuantizedTensor.quantize(dense, kind)
    bias = torch.randn(outs) * 10.0**log_weight if biased else None
    x = inputs(rows + seen, 32 * blocks) * 10.0**log_input
    check(x[:rows], weight, bias, Screen(weight, bias, x[rows:]))


@pytest.mark.parametrize("kind", KINDS)
def test_most_rows_are_left_alone(kind: str) -> None:
    torch.manual_seed(1)
    weight = QuantizedTensor.quantize(torch.randn(4096, 192), kind)
    x = inputs(100, 192, far=1.0)
    x = x + 0.3 * weight.rows(torch.randint(0, 4096, (100,)))  # each has a token in mind
    screen = Screen(weight, None, x[:90])
    check(x[90:], weight, None, screen)
    screen.counts.zero_()
    for row in x[90:]:
        ops.greedy(row[None, None], weight, screen=screen)
    computed, calls = screen.counts.tolist()
    assert calls == 10
    assert computed / calls < 4096 / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_ties_go_to_the_lowest_index(kind: str, rows: int) -> None:
    torch.manual_seed(2)
    dense = torch.randn(100, 64)
    dense[[17, 40, 99]] = dense[17] * 3
    for weights in (dense, dense[:1].expand(100, -1).contiguous(), torch.zeros(100, 64)):
        weight = QuantizedTensor.quantize(weights, kind)
        x = torch.randn(rows, 64) + 2 * weights[17]
        check(x, weight, None, Screen(weight, None, x))
        x.zero_()
        check(x, weight, None, Screen(weight, None, x))


@pytest.mark.parametrize(
    ("weights", "of_inputs"), [(1e30, 1e7), (1e-40, 1e30), (1e-44, 1e-3), (1e-20, 1e-25), (1e4, 1e33), (3e18, 1e18)]
)
def test_extreme_magnitudes(weights: float, of_inputs: float) -> None:
    torch.manual_seed(3)
    weight = torch.randn(50, 64) * weights
    x = torch.randn(5, 64) * of_inputs
    try:
        screen = Screen(weight, None, torch.randn(8, 64))
    except ValueError:
        assert weights > 1e5  # scales are halves
        return
    if outputs(x, weight, None).isfinite().all():
        check(x, weight, None, screen)
    else:
        with pytest.raises(BadLogits):
            ops.greedy(x[:, None], weight, screen=screen)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    torch.manual_seed(4)
    weight = torch.randn(40, 64)
    screen = Screen(weight, None, torch.randn(8, 64))
    x = torch.randn(3, 1, 64)
    x[1, 0, 5] = value
    with pytest.raises(BadLogits, match="row 1"):
        ops.greedy(x, weight, screen=screen)
    weight[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        Screen(weight, None, torch.randn(8, 64))
    with pytest.raises(ValueError, match="not finite"):
        Screen(torch.ones(1, 64), torch.tensor([value]), torch.randn(8, 64))


def tight() -> tuple[Tensor, Tensor, Screen]:
    """An input and a weight whose largest output, 7, is all but as far above its coarse copy as it can be; another
    output, 40, lies between the two."""
    torch.manual_seed(5)
    seen = torch.randn(400, 256)
    seen[:, :32] *= 30
    row = torch.randn(256)
    rest = row.clone()
    coarsen(rest[None], torch.empty(1, 256 // 32 * 18, dtype=torch.uint8))
    x = rest.clone()
    x[:32] = 0  # the main directions
    x /= x.norm()
    high, low = float(row @ x), float((row - rest) @ x)
    weight = torch.zeros(60, 256)
    weight[7], weight[40] = row, (low + 0.97 * (high - low)) * x
    return x, weight, Screen(weight, None, seen)


@pytest.mark.parametrize("fault", [1.0, 0.45])
def test_a_bound_too_small_is_noticed(fault: float) -> None:
    x, weight, screen = tight()
    assert int(outputs(x[None], weight, None).argmax()) == 7
    screen.slack = (screen.slack.view(torch.bfloat16) * fault).view(torch.int16)
    if fault == 1:
        check(x[None], weight, None, screen)
        return
    with pytest.raises(AssertionError):
        check(x[None], weight, None, screen)
    tokens, bounds, _ = _bounded(x[None, None], screen)
    assert int(tokens) == 40
    assert float(bounds[0, 7]) < float(outputs(x[None], weight, None)[0, 7])


def test_forgetting_the_products_is_noticed() -> None:
    torch.manual_seed(6)
    weight, x = torch.randn(300, 96), inputs(60, 96, far=30.0)
    screen = Screen(weight, None, x[8:])
    check(x[:8], weight, None, screen)
    screen.basis = torch.zeros_like(screen.basis)  # as if nothing were known, with the slack of one that is
    with pytest.raises(AssertionError):
        check(x[:8], weight, None, _with_larger(screen))


def _with_larger(screen: Screen) -> Screen:
    screen.inverses = screen.inverses.clone()
    screen.inverses[-2:] = 0  # and the error left out that would make up for it
    return screen


def test_reasons_against_a_screen() -> None:
    dense = torch.randn(10, 64)
    for weight, bias, reason in (
        (QuantizedTensor.quantize(dense, "Q4_0"), None, "no smaller"),
        (QuantizedTensor.quantize(dense, "Q4_1"), None, "no smaller"),
        (dense.double(), None, "float64"),
        (dense[:, ::2], None, "not contiguous"),
        (torch.randn(10, 40), None, "blocks of 32"),
        (dense, torch.randn(10).double(), "bias is torch.float64"),
    ):
        found = Screen.why_not(weight, bias)
        assert found is not None
        assert reason in found
        with pytest.raises(ValueError, match="Screen: "):
            Screen(weight, bias, torch.randn(5, 64))


def test_other_inputs_take_the_full_product() -> None:
    torch.manual_seed(7)
    weight = torch.randn(30, 64)
    screen, x = Screen(weight, None, torch.randn(9, 64)), torch.randn(2, 40, 64)
    wanted = ops.linear(x, weight).argmax(-1)
    assert torch.equal(ops.greedy(x, weight, screen=screen), wanted)
    assert torch.equal(ops.greedy(x, weight), wanted)
    assert int(screen.counts[1]) == 0
    with ops.backend("reference"):
        assert torch.equal(ops.greedy(x, weight, screen=screen), wanted)
    assert "the screen is of another weight" in str(ops.explain("greedy", x[:, :1], weight.clone(), screen=screen))


def test_pays_when_little_is_computed() -> None:
    weight = torch.randn(1000, 64)
    screen = Screen(weight, None, torch.randn(9, 64))
    screen.counts[:] = torch.tensor([100 * 20, 100])
    assert screen.pays
    screen.counts[:] = torch.tensor([100 * 600, 100])
    assert not screen.pays
