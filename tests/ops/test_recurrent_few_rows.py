"""Recurrent sequences of one to seven rows: results and gradients against torch's modules, judged by float64.

Where there are tiles of int8 these are products in digits, all digits of up to five rows in one tile
(csrc/cpu/digits.h).
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastlm import nn
from fastlm.kernels import native, packing

pytestmark = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))

KINDS = ("LSTM", "GRU", "RNN")


def _results(module: torch.nn.RNNBase, input: Tensor, lengths: list[int] | None, h0: Tensor) -> list[Tensor]:
    """Output and final states, and gradients of input, h0 and the parameters for random ones of those."""
    dtype = next(module.parameters()).dtype
    input, h0 = (t.detach().to(dtype).requires_grad_() for t in (input, h0))
    states = (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0
    output, final = module(input if lengths is None else pack_padded_sequence(input, lengths), states)
    rows = output.data if isinstance(output, PackedSequence) else output
    results = [rows, *(final if isinstance(final, tuple) else (final,))]
    random = torch.Generator().manual_seed(0)
    upstream = [torch.randn(r.shape, generator=random).to(dtype) for r in results]
    return [r.detach() for r in results] + list(
        torch.autograd.grad(results, [input, h0, *module.parameters()], upstream)
    )


def _output(module: torch.nn.RNNBase, x: Tensor, h0: Tensor) -> Tensor:
    output: Tensor = module(x, (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0)[0]
    return output


def _check(
    kind: str,
    sizes: tuple[int, int, int],
    lengths: list[int] | None,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    scale: float = 1.0,
    steps: int = 9,
) -> None:
    inputs, hidden, batch = sizes
    peer = getattr(torch.nn, kind)(inputs, hidden, layers, bidirectional=bidirectional)
    ours = getattr(nn, kind)(inputs, hidden, layers, bidirectional=bidirectional)
    ours.load_state_dict(peer.state_dict())
    exact = copy.deepcopy(peer).double()
    arguments = (
        torch.randn(steps if lengths is None else lengths[0], batch, inputs),
        lengths,
        torch.randn(layers * (1 + bidirectional), batch, hidden) * scale,
    )
    found = zip(*(_results(module, *arguments) for module in (ours, peer, exact)), strict=True)
    for fast, torchs, reference in found:
        assert_close_to_reference(fast, torchs, reference, floor=3e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    batch, steps = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 12))
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    _check(
        data.draw(st.sampled_from(KINDS)),
        (data.draw(st.integers(4, 80)), data.draw(st.integers(8, 150)), batch),
        None if lengths is None else sorted(lengths, reverse=True),
        layers=data.draw(st.integers(1, 2)),
        bidirectional=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0])),
        steps=steps,
    )


@pytest.mark.parametrize("batch", [1, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads(kind: str, batch: int) -> None:
    """Enough work for several threads, and more than one chunk of steps."""
    _check(kind, (70, 330, batch), None, steps=110)


@pytest.mark.parametrize("batch", [1, 4, 7, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_first_states_far_beyond_one(kind: str, batch: int) -> None:
    """A GRU keeps them for some steps, and then has states of the usual size: each step is in units of its largest.
    In those of the first states throughout, its error stayed at 10 times torch's. The median of some layers."""
    errors = []
    for seed in range(9):
        torch.manual_seed(seed)
        peer, ours = getattr(torch.nn, kind)(40, 100), getattr(nn, kind)(40, 100)
        ours.load_state_dict(peer.state_dict())
        x, h0 = torch.randn(60, batch, 40), torch.randn(1, batch, 100)
        h0[..., 0] *= 30
        with torch.no_grad():
            exact = _output(copy.deepcopy(peer).double(), x.double(), h0.double())
            errors.append([(_output(module, x, h0) - exact)[-10:].square().mean().sqrt() for module in (ours, peer)])
    mine, torchs = torch.tensor(errors).median(0).values
    assert mine <= 2.5 * torchs


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_the_sequence(kind: str) -> None:
    """Both ways are as near to float64 as torch is, and have the same bits."""
    torch.manual_seed(0)
    peer, ours = getattr(torch.nn, kind)(24, 48), getattr(nn, kind)(24, 48)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(30, 3, 24)
    with torch.no_grad():
        exact = copy.deepcopy(peer).double()(x.double())[0]
        state, steps = None, []
        for row in x:
            output, state = ours(row[None], state)
            steps.append(output)
        found = torch.cat(steps)
        assert torch.equal(found, ours(x)[0])
        assert_close_to_reference(found, peer(x)[0], exact)


def test_uneven_weights_are_floats() -> None:
    """Both the rows' and the columns': digits in units of a weight far above the others would lose those."""
    from fastlm.kernels.cpu import recurrent_digits

    if packing.digit_tiles():
        for shape in ((33, 70), (300, 1000), (1, 1)):
            weight = torch.randn(shape).clamp(-3, 3)
            assert recurrent_digits._evenness(weight) == 3
        weight[0, 0] = torch.nan
        assert recurrent_digits._evenness(weight) == 3
        weight = torch.randn(64, 100).clamp(-3, 3)
        weight[63, 99] = 3000
        assert recurrent_digits._evenness(weight) == 0
        weight[:, 99] = 3000  # its column is even now, no row is
        assert recurrent_digits._evenness(weight) == 2
        assert recurrent_digits._evenness(weight.t()) == 1
    torch.manual_seed(0)
    for kind in KINDS[:2]:
        peer, ours = getattr(torch.nn, kind)(20, 64), getattr(nn, kind)(20, 64)
        with torch.no_grad():
            peer.weight_hh_l0[:, 5] *= 1000
            peer.weight_hh_l0[:, 6:] /= 10
        ours.load_state_dict(peer.state_dict())
        x = torch.randn(6, 2, 20) * 0.1
        with torch.no_grad():
            assert_close_to_reference(ours(x)[0], peer(x)[0], copy.deepcopy(peer).double()(x.double())[0])
