"""The reference of the variants against the papers' formulas, unit by unit, and in limits that are known."""

from __future__ import annotations

import math
from statistics import fmean, pvariance
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.reference.gru import gru, gru_cell
from fastlm.reference.lstm import lstm, lstm_cell
from fastlm.reference.recurrent import NORM_EPS, Noise, draw_noise

H, INPUTS = 5, 4
CELLS = ("lstm", "gru")
GATES = {"lstm": 4, "gru": 3}
STATES = {"lstm": 2, "gru": 1}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def plain_weights(cell: str) -> list[Tensor]:
    rows = GATES[cell] * H
    return [normal(rows, INPUTS), normal(rows, H), normal(rows), normal(rows)]


def norms(cell: str) -> list[Tensor]:
    gains = [normal(GATES[cell] * H), normal(GATES[cell] * H)]
    return [*gains, normal(H), normal(H)] if cell == "lstm" else gains


def some_noise(cell: str, batch: int, rows: int, *first: int) -> Noise:
    """Masks of 0 and 2, and shares from 0 to 1, with `first` as first dimensions."""
    mask = 2 * torch.rand(*first, batch, H).round().double()
    return Noise(mask, *(torch.rand(*first, rows, H).double() for _ in range(STATES[cell])))


def by_hand(cell: str, x: Tensor, states: list[Tensor], weights: list[Tensor], norm: list[Tensor], noise: Noise) -> Any:
    """One row, in scalars."""

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    def normalized(values: list[float], gain: Tensor, bias: list[float]) -> list[float]:
        scale = 1 / math.sqrt(pvariance(values) + NORM_EPS)
        return [(v - fmean(values)) * scale * g + b for v, g, b in zip(values, gain.tolist(), bias, strict=True)]

    def product(weight: list[list[float]], vector: list[float]) -> list[float]:
        return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in weight]

    def chunks(values: list[float]) -> list[list[float]]:
        return [values[start : start + H] for start in range(0, len(values), H)]

    h = states[0].tolist()
    mask, z_h, *z_c = (t.tolist() for t in noise if t is not None)
    w_ih, w_hh, b_ih, b_hh = (w.tolist() for w in weights)
    from_x = normalized(product(w_ih, x.tolist()), norm[0], b_ih)
    from_h = normalized(product(w_hh, [m * v for m, v in zip(mask, h, strict=True)]), norm[1], b_hh)
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = chunks(from_x), chunks(from_h)
        new = []
        for u in range(H):
            r, z = sigmoid(x_r[u] + h_r[u]), sigmoid(x_z[u] + h_z[u])
            new.append((1 - z) * math.tanh(x_n[u] + r * h_n[u]) + z * h[u])
        return ([z_h[u] * h[u] + (1 - z_h[u]) * new[u] for u in range(H)],)
    i, f, g, o = chunks([a + b for a, b in zip(from_x, from_h, strict=True)])
    c = states[1].tolist()
    cells = [sigmoid(f[u]) * c[u] + sigmoid(i[u]) * math.tanh(g[u]) for u in range(H)]
    new = [sigmoid(o[u]) * math.tanh(v) for u, v in enumerate(normalized(cells, norm[2], norm[3].tolist()))]
    return (
        [z_h[u] * h[u] + (1 - z_h[u]) * new[u] for u in range(H)],
        [z_c[0][u] * c[u] + (1 - z_c[0][u]) * cells[u] for u in range(H)],
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_the_papers_formulas(cell: str) -> None:
    batch = 3
    x, states = normal(batch, INPUTS), [normal(batch, H) for _ in range(STATES[cell])]
    weights, norm = plain_weights(cell), norms(cell)
    noise = some_noise(cell, batch, batch)
    if cell == "lstm":
        found: Any = lstm_cell(x, *states, *weights, None, *norm, noise=noise)  # type: ignore[arg-type]
    else:
        found = (gru_cell(x, *states, *weights, *norm, noise=noise),)
    for row in range(batch):
        of_row = Noise(*(None if t is None else t[row] for t in noise))
        expected = by_hand(cell, x[row], [s[row] for s in states], weights, norm, of_row)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got[row], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def run(cell: str, noise: Noise, lengths: tuple[int, ...] = (4, 2, 1)) -> Any:
    """(input, states, weights, the reference's result) of one layer in both directions."""
    torch.manual_seed(1)
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
    weights = plain_weights(cell) * 2
    states = tuple(normal(2, len(lengths), H) for _ in range(STATES[cell]))
    input = normal(sum(lengths), INPUTS)
    return input, states, weights, call(cell, input, states, weights, sizes, noise)


def call(cell: str, input: Tensor, states: Any, weights: list[Tensor], sizes: Tensor | None, noise: Noise) -> Any:
    function: Any = {"lstm": lstm, "gru": gru}[cell]
    return function(input, states, weights, sizes, 1, True, False, True, 0.0, False, *noise[: 1 + len(states)])


@pytest.mark.parametrize("cell", CELLS)
def test_the_limits(cell: str) -> None:
    """A mask of ones and shares of zero change nothing; shares of one keep the first state."""
    ones, zeros = torch.ones(2, 3, H, dtype=torch.float64), torch.zeros(2, 7, H, dtype=torch.float64)
    shares = [zeros] * STATES[cell]
    *_, plain = run(cell, Noise())
    *_, same = run(cell, Noise(ones, *shares))
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    _, states, _, (output, final) = run(cell, Noise(None, *(s + 1 for s in shares)))
    torch.testing.assert_close(final, states)
    torch.testing.assert_close(output[:3], torch.cat([states[0][0], states[0][1]], dim=-1))
    *_, (_, dropped) = run(cell, Noise(0 * ones))
    assert not torch.allclose(dropped[0], plain[1][0])


@pytest.mark.parametrize("cell", CELLS)
def test_each_rows_noise_is_its_own(cell: str) -> None:
    """Of a ragged batch in both directions, each row alone with its share of the noise."""
    lengths = (4, 2, 1)
    noise = some_noise(cell, 3, 7, 2)
    input, states, weights, (output, final) = run(cell, noise, lengths)
    for row, of_row in enumerate(([0, 3, 5, 6], [1, 4], [2])):
        assert len(of_row) == lengths[row]
        assert noise.dropout is not None
        own = Noise(noise.dropout[:, row : row + 1], *(None if t is None else t[:, of_row] for t in noise[1:]))
        alone, state = call(cell, input[of_row, None], tuple(s[:, row : row + 1] for s in states), weights, None, own)
        torch.testing.assert_close(alone[:, 0], output[of_row])
        torch.testing.assert_close(state[0][:, 0], final[0][:, row])


def test_without_variants_the_gru_is_torchs() -> None:
    """Nor with normalisation undone: gains that are the deviation of what they multiply, of one row at one step."""
    weights, x, h = plain_weights("gru"), normal(1, INPUTS), normal(1, H)
    expected = torch.gru_cell(x, h, *weights)
    torch.testing.assert_close(gru_cell(x, h, *weights), expected)
    w_ih, w_hh, b_ih, b_hh = weights
    gains, shifts = [], []
    for product, bias in ((x @ w_ih.t(), b_ih), (h @ w_hh.t(), b_hh)):
        gains.append((product.var(correction=0) + NORM_EPS).sqrt().expand(3 * H))
        shifts.append(bias + product.mean())
    torch.testing.assert_close(gru_cell(x, h, w_ih, w_hh, *shifts, *gains), expected)


@pytest.mark.parametrize("cell", ["lstm", "lstm with projection", "gru"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool, cell: str) -> None:
    """Of all variants at once."""
    hidden, out, gates = 3, 2 if "projection" in cell else 3, GATES[cell.split()[0]]
    shapes = [(gates * hidden, 2), (gates * hidden, out), *([(gates * hidden,)] * 2 if bias else [])]
    shapes += [(out, hidden)] if out != hidden else []
    shapes += [(gates * hidden,), (gates * hidden,)]
    shapes += [(hidden,), *([(hidden,)] if bias else [])] if gates == 4 else []
    weights = [normal(*shape) for shape in shapes]
    widths = (out, hidden) if gates == 4 else (out,)
    states = [normal(1, 2, width) for width in widths]
    noise = (2 * torch.rand(1, 2, out).double().round(), *(torch.rand(1, 6, width).double() for width in widths))
    reference: Any = lstm if gates == 4 else gru

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        given, weights = tensors[: len(states)], tensors[len(states) :]
        output, final = reference(x, given, weights, None, 1, False, False, bias, 0.0, True, *noise)
        return torch.cat([output.flatten(), *(s.flatten() for s in final)])

    leaves = [t.requires_grad_() for t in (normal(3, 2, 2), *states, *weights)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_noise_is_drawn_with_the_given_probabilities() -> None:
    states = torch.zeros(2, 50, 60), torch.zeros(2, 50, 80)
    noise = draw_noise(400, states, 0.3, (0.1, 0.6), True)
    assert noise.dropout is not None and noise.zoneout_h is not None and noise.zoneout_c is not None
    assert noise.dropout.shape == (2, 50, 60)
    assert noise.dropout.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (noise.dropout == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    for shares, width, p in ((noise.zoneout_h, 60, 0.1), (noise.zoneout_c, 80, 0.6)):
        assert shares.shape == (2, 400, width)
        assert shares.unique().tolist() == [0, 1]
        assert shares.mean() == pytest.approx(p, abs=0.02)
    assert draw_noise(400, states, 0.3, (0.0, 0.0), False) == Noise()
    still = draw_noise(400, states, 0.3, (0.1, 0.0), False)
    assert still.dropout is None and still.zoneout_c is None and still.zoneout_h is not None
    assert still.zoneout_h.unique().tolist() == pytest.approx([0.1])
    everything = draw_noise(4, states, 1.0, (0.0, 0.0), True).dropout
    assert everything is not None and not everything.any()
    one = draw_noise(400, states[:1], 0.3, (0.1,), True)
    assert one.zoneout_h is not None and one.zoneout_c is None
