"""The reference of the LSTM's variants against the papers' formulas, unit by unit, and in limits that are known."""

from __future__ import annotations

import math
from statistics import fmean, pvariance
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.reference.lstm import NORM_EPS, draw_noise, lstm, lstm_cell
from fastlm.reference.recurrent import Noise

H, INPUTS = 5, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def norms() -> list[Tensor]:
    return [normal(4 * H), normal(4 * H), normal(H), normal(H)]


def by_hand(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], norm: list[Tensor], noise: Noise) -> Any:
    """One row, in scalars."""

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    def normalized(values: list[float], gain: Tensor, bias: Tensor | None = None) -> list[float]:
        scale = 1 / math.sqrt(pvariance(values) + NORM_EPS)
        shift = [0.0] * len(values) if bias is None else bias.tolist()
        return [(v - fmean(values)) * scale * g + b for v, g, b in zip(values, gain.tolist(), shift, strict=True)]

    mask, z_h, z_c = (t.tolist() for t in noise)
    w_ih, w_hh, b_ih, b_hh = (w.tolist() for w in weights)
    from_x = normalized([sum(w * v for w, v in zip(row, x.tolist(), strict=True)) for row in w_ih], norm[0])
    dropped = [m * v for m, v in zip(mask, h.tolist(), strict=True)]
    from_h = normalized([sum(w * v for w, v in zip(row, dropped, strict=True)) for row in w_hh], norm[1])
    gates = [a + b + p + q for a, b, p, q in zip(from_x, from_h, b_ih, b_hh, strict=True)]
    i, f, g, o = (gates[k * H : (k + 1) * H] for k in range(4))
    cells = [sigmoid(f[u]) * c[u].item() + sigmoid(i[u]) * math.tanh(g[u]) for u in range(H)]
    new = [sigmoid(o[u]) * math.tanh(v) for u, v in enumerate(normalized(cells, norm[2], norm[3]))]
    return (
        [z_h[u] * h[u].item() + (1 - z_h[u]) * new[u] for u in range(H)],
        [z_c[u] * c[u].item() + (1 - z_c[u]) * cells[u] for u in range(H)],
    )


def test_a_step_is_the_papers_formulas() -> None:
    batch = 3
    x, h, c = normal(batch, INPUTS), normal(batch, H), normal(batch, H)
    weights = [normal(4 * H, INPUTS), normal(4 * H, H), normal(4 * H), normal(4 * H)]
    norm = norms()
    noise = Noise(2 * torch.rand(batch, H).round().double(), *(torch.rand(batch, H).double() for _ in range(2)))
    found = lstm_cell(x, h, c, *weights, None, *norm, noise=noise)
    for row in range(batch):
        expected = by_hand(x[row], h[row], c[row], weights, norm, noise.of_layer(row))
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got[row], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def run(noise: Noise, lengths: tuple[int, ...] = (4, 2, 1), weights: list[Tensor] | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
    given = [normal(4 * H, INPUTS), normal(4 * H, H), normal(4 * H), normal(4 * H)] * 2
    states = normal(2, len(lengths), H), normal(2, len(lengths), H)
    input = normal(sum(lengths), INPUTS)
    return states, lstm(
        input, states, weights or given, sizes, 1, True, False, True, 0.0, kwargs.get("layer_norm", False), *noise
    )


def test_the_limits() -> None:
    """A mask of ones and shares of zero change nothing; shares of one keep the first state."""
    ones, zeros = torch.ones(2, 3, H, dtype=torch.float64), torch.zeros(2, 7, H, dtype=torch.float64)
    _, plain = run(Noise())
    _, same = run(Noise(ones, zeros, zeros))
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    (h, c), (output, (h_n, c_n)) = run(Noise(None, zeros + 1, zeros + 1))
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(c_n, c)
    torch.testing.assert_close(output[:3], torch.cat([h[0], h[1]], dim=-1))
    _, (_, (dropped, _)) = run(Noise(0 * ones))
    assert not torch.allclose(dropped, plain[1][0])


def test_each_rows_noise_is_its_own() -> None:
    """Of a ragged batch in both directions, each row alone with its share of the noise."""
    lengths = (4, 2, 1)
    noise = Noise(2 * torch.rand(2, 3, H).round().double(), *(torch.rand(2, 7, H).double() for _ in range(2)))
    torch.manual_seed(1)
    weights = [normal(4 * H, INPUTS), normal(4 * H, H), normal(4 * H), normal(4 * H)] * 2
    states = normal(2, 3, H), normal(2, 3, H)
    input = normal(7, INPUTS)
    _, (output, (h_n, _)) = run(noise)
    for row, of_row in enumerate(([0, 3, 5, 6], [1, 4], [2])):
        assert len(of_row) == lengths[row]
        own = Noise(noise.dropout[:, row : row + 1], *(t[:, of_row] for t in noise[1:]))  # type: ignore[index]
        alone, (h, _) = lstm(
            input[of_row, None], tuple(s[:, row : row + 1] for s in states), weights, None,
            1, True, False, True, 0.0, False, *own,
        )  # fmt: skip
        torch.testing.assert_close(alone[:, 0], output[of_row])
        torch.testing.assert_close(h[:, 0], h_n[:, row])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool, projected: bool) -> None:
    """Of all variants at once."""
    hidden, out = 3, 2 if projected else 3
    shapes = [(4 * hidden, 2), (4 * hidden, out), *([(4 * hidden,)] * 2 if bias else [])]
    shapes += [(out, hidden)] if projected else []
    shapes += [(4 * hidden,), (4 * hidden,), (hidden,), *([(hidden,)] if bias else [])]
    weights = [normal(*shape) for shape in shapes]
    states = [normal(1, 2, out), normal(1, 2, hidden)]
    noise = (
        2 * torch.rand(1, 2, out).double().round(),
        torch.rand(1, 6, out).double(),
        torch.rand(1, 6, hidden).double(),
    )

    def function(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        output, final = lstm(x, (h, c), weights, None, 1, False, False, bias, 0.0, True, *noise)
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
