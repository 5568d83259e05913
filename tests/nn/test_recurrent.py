"""fastlm.nn's recurrent modules against torch.nn's: swapped state_dicts, the same results, gradients and errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch_twins import hidden, leaves, pair, raised

import fastlm.nn
from fastlm import ops

SEQUENCES = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def outputs_and_gradients(module: Any, input: Any, hx: Any) -> list[Tensor]:
    """Every output, and the gradient of a fixed random weighting of them for each parameter and each of hx."""
    module.zero_grad()
    wanted = [*module.parameters(), *(leaves(hx) if hx is not None else [])]
    results = leaves(module(input) if hx is None else module(input, hx))
    generator = torch.Generator().manual_seed(5)
    weighting = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    grads = torch.autograd.grad(results, wanted, weighting)
    return [r.detach() for r in results] + list(grads)


def map_tensors(function: Any, value: Any) -> Any:
    """`function` of each floating-point tensor of an input or hx."""
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if isinstance(value, tuple):
        return tuple(function(v) for v in value)
    return None if value is None else function(value)


def assert_same_module(ours: Any, theirs: Any, input: Any, hx: Any = None, floor: float = 1e-6) -> None:
    """Asserts the bound for outputs and all gradients; the float64 module is torch's."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    hx = map_tensors(leaf, hx)
    exact = outputs_and_gradients(
        copy.deepcopy(theirs).double(),
        map_tensors(Tensor.double, input),
        map_tensors(lambda t: t.detach().double().requires_grad_(), hx),
    )
    near = outputs_and_gradients(theirs, input, hx)
    found = outputs_and_gradients(ours, input, hx)
    assert len(found) == len(exact)
    for fast, same_dtype, reference in zip(found, near, exact, strict=True):
        assert_close_to_reference(fast, same_dtype, reference, floor=floor)
    with torch.no_grad():
        quiet = leaves(ours(input) if hx is None else ours(input, hx))
    for fast, same_dtype, reference in zip(quiet, near, exact, strict=False):
        assert_close_to_reference(fast, same_dtype, reference, floor=floor)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *[(name, {}) for name in SEQUENCES],
        *[(name, {"num_layers": 3, "bidirectional": True, "bias": False}) for name in SEQUENCES],
        ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
        ("LSTM", {"proj_size": 3, "bias": False}),
        ("RNN", {"nonlinearity": "relu", "batch_first": True}),
        *[(name, {}) for name in CELLS],
        *[(name, {"bias": False}) for name in CELLS],
        ("RNNCell", {"nonlinearity": "relu"}),
    ],
)
def test_a_twin_of_torchs(name: str, kwargs: dict[str, Any]) -> None:
    """The same constructor, parameters in the same order, initial values under the same seed, and printed form."""
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(5, 7, **kwargs)
    torch.manual_seed(3)
    ours = getattr(fastlm.nn, name)(5, 7, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    other = getattr(torch.nn, name)(5, 7, **kwargs)
    ours.load_state_dict(other.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), other.parameters(), strict=True))
    assert ours.to(torch.float64)(torch.randn(2, 5, dtype=torch.float64)) is not None


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("given_hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_padded(name: str, given_hx: bool, batch_first: bool) -> None:
    ours, theirs = pair(name, 5, 19, num_layers=2, bidirectional=True, batch_first=batch_first)
    assert_same_module(
        ours, theirs, torch.randn(4, 3, 5), hidden(name, ours, 4, 4 if batch_first else 3) if given_hx else None
    )


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("given_hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(name: str, given_hx: bool, batch_first: bool) -> None:
    ours, theirs = pair(name, 5, 8, num_layers=2, batch_first=batch_first)
    assert_same_module(ours, theirs, torch.randn(6, 5), hidden(name, ours, 2) if given_hx else None)


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("given_hx", [False, True])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_packed(name: str, given_hx: bool, is_sorted: bool) -> None:
    ours, theirs = pair(name, 5, 17, num_layers=2, bidirectional=True)
    rows = [torch.randn(length, 5) for length in ((4, 3, 3, 1) if is_sorted else (3, 1, 4, 3))]
    packed = pack_sequence(rows, enforce_sorted=is_sorted)
    assert_same_module(ours, theirs, packed, hidden(name, ours, 4, 4) if given_hx else None)
    found, expected = ours(packed)[0], theirs(packed)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(found, field), getattr(expected, field)
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, (3, 1, 4)])
def test_projection(lengths: tuple[int, ...] | None) -> None:
    ours, theirs = pair("LSTM", 6, 21, num_layers=2, bidirectional=True, proj_size=5)
    padded = torch.randn(4, 3, 6)
    input = padded if lengths is None else pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
    assert_same_module(ours, theirs, input)
    assert_same_module(ours, theirs, input, hidden("LSTM", ours, 4, 3))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data: Any) -> None:
    name = data.draw(st.sampled_from(SEQUENCES))
    size = st.integers(1, 24)
    ours, theirs = pair(
        name,
        data.draw(size),
        data.draw(size),
        num_layers=data.draw(st.integers(1, 2)),
        bias=data.draw(st.booleans()),
        batch_first=data.draw(st.booleans()),
        bidirectional=data.draw(st.booleans()),
    )
    lengths = data.draw(st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=5))
    if lengths is None:
        input: Any = torch.randn(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), ours.input_size)
    else:
        input = pack_sequence([torch.randn(length, ours.input_size) for length in lengths], enforce_sorted=False)
    assert_same_module(ours, theirs, input, floor=1e-5)  # see recurrent_cases.compare


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (0, 5)])
def test_cells(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(name, 5, 9)
    x = torch.randn(*shape)
    states = [torch.randn(*shape[:-1], 9) for _ in range(2)]
    hx = tuple(states) if name == "LSTMCell" else states[0]
    assert_same_module(ours, theirs, x)
    assert_same_module(ours, theirs, x, hx)


@pytest.mark.parametrize(("name", "kwargs"), [("RNN", {"num_layers": 2}), ("RNNCell", {})])
def test_relu(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = pair(name, 5, 9, nonlinearity="relu", **kwargs)
    assert_same_module(ours, theirs, torch.randn(4, 3, 5)[: 4 if name == "RNN" else 1].squeeze(0))


SEQUENCE_CALLS: dict[str, Any] = {
    "no steps": lambda name: (torch.zeros(0, 2, 3),),
    "no steps, unbatched": lambda name: (torch.zeros(0, 3),),
    "no steps, no rows": lambda name: (torch.zeros(0, 0, 3),),
    "one dimension": lambda name: (torch.zeros(3),),
    "four dimensions": lambda name: (torch.zeros(1, 1, 1, 3),),
    "wrong width": lambda name: (torch.zeros(2, 2, 5),),
    "wrong dtype": lambda name: (torch.zeros(2, 2, 3).double(),),
    "hx of another batch": lambda name: (torch.zeros(2, 2, 3), hx(name, 1, 3, 4)),
    "hx of another width": lambda name: (torch.zeros(2, 2, 3), hx(name, 1, 2, 5)),
    "hx of other layers": lambda name: (torch.zeros(2, 2, 3), hx(name, 2, 2, 4)),
    "hx unbatched": lambda name: (torch.zeros(2, 2, 3), hx(name, 1, 4)),
    "hx batched": lambda name: (torch.zeros(2, 3), hx(name, 1, 1, 4)),
}


def hx(name: str, *shape: int) -> Any:
    return (torch.zeros(*shape), torch.zeros(*shape)) if name.startswith("LSTM") else torch.zeros(*shape)


@pytest.mark.parametrize("call", SEQUENCE_CALLS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_refuses_what_torch_refuses_with_torchs_error(name: str, call: str) -> None:
    ours, theirs = pair(name, 3, 4)
    expected = raised(lambda: theirs(*SEQUENCE_CALLS[call](name)))
    assert expected is not None
    assert raised(lambda: ours(*SEQUENCE_CALLS[call](name))) == expected


@pytest.mark.parametrize("name", SEQUENCES)
def test_refuses_an_hx_that_does_not_fit_a_packed_input(name: str) -> None:
    """torch.nn.LSTM computes something here."""
    ours, theirs = pair(name, 3, 4)
    arguments = (pack_sequence([torch.zeros(2, 3)]), hx(name, 1, 2, 4))
    error = raised(lambda: ours(*arguments))
    assert error is not None
    assert error == (raised(lambda: theirs(*arguments)) or error)
    assert name != "LSTM" or "batch of 2" in error[1]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "call",
    [
        lambda name: (torch.zeros(2, 5),),
        lambda name: (torch.zeros(1, 2, 3),),
        lambda name: (torch.zeros(2, 3), hx(name, 3, 4)),
        lambda name: (torch.zeros(2, 3), hx(name, 2, 5)),
        lambda name: (torch.zeros(2, 3).double(), hx(name, 2, 4)),
    ],
)
def test_cells_refuse_what_torch_refuses_with_torchs_error(name: str, call: Any) -> None:
    ours, theirs = pair(name, 3, 4)
    expected = raised(lambda: theirs(*call(name)))
    assert expected is not None
    assert raised(lambda: ours(*call(name))) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_size": 0},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"bias": 1},
        {"hidden_size": 2.0},
        {"proj_size": 4},
    ],
)
def test_constructor_refuses_what_torch_refuses(arguments: dict[str, Any]) -> None:
    given = {"input_size": 3, "hidden_size": 4} | arguments
    expected = raised(lambda: torch.nn.LSTM(**given))
    assert expected is not None
    assert raised(lambda: fastlm.nn.LSTM(**given)) == expected
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        fastlm.nn.RNN(3, 4, nonlinearity="gelu")


@pytest.mark.parametrize("name", SEQUENCES)
def test_an_empty_batch_is_as_in_torch(name: str) -> None:
    ours, theirs = pair(name, 3, 4, bidirectional=True)
    found, expected = leaves(ours(torch.zeros(2, 0, 3))), leaves(theirs(torch.zeros(2, 0, 3)))
    assert [t.shape for t in found] == [t.shape for t in expected]


@pytest.mark.parametrize("name", SEQUENCES)
def test_dropout(name: str) -> None:
    """In training it acts and follows the seed; in evaluation there is none."""
    ours, theirs = pair(name, 5, 32, num_layers=3, dropout=0.4)
    x = torch.randn(6, 4, 5)

    def run(module: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)[0].detach()

    assert torch.equal(run(ours, 1), run(ours, 1))
    assert not torch.equal(run(ours, 1), run(ours, 2))
    torch.testing.assert_close(run(ours, 1), run(theirs, 1))  # torch draws the same masks
    ours.eval(), theirs.eval()
    assert torch.equal(run(ours, 1), run(ours, 2))
    torch.testing.assert_close(run(ours, 1), run(theirs, 1))


@pytest.mark.parametrize("name", SEQUENCES)
def test_weights_may_be_replaced(name: str) -> None:
    """By functional_call, a parametrization, a plain tensor (as weight dropout does), or a new parameter."""
    ours, theirs = pair(name, 5, 6)
    x = torch.randn(3, 2, 5)
    doubled = {key: 2 * value for key, value in ours.state_dict().items()}
    expected = torch.func.functional_call(theirs, doubled, (x,))[0]
    torch.testing.assert_close(torch.func.functional_call(ours, doubled, (x,))[0], expected)

    class Double(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrized = copy.deepcopy(ours)
    for key in doubled:
        torch.nn.utils.parametrize.register_parametrization(parametrized, key, Double())
    torch.testing.assert_close(parametrized(x)[0], expected)
    replaced = copy.deepcopy(ours)
    for key, value in doubled.items():
        del replaced._parameters[key]
        setattr(replaced, key, value)
    torch.testing.assert_close(replaced(x)[0], expected)
    for key, value in doubled.items():
        setattr(ours, key, torch.nn.Parameter(value))
    torch.testing.assert_close(ours(x)[0], expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_copies_and_pickles(name: str) -> None:
    ours, _ = pair(name, 5, 6, bidirectional=True)
    x = torch.randn(3, 2, 5)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], ours(x)[0])


def test_the_comparison_refuses_faults() -> None:
    """Each of these modules is wrong in one way, and the comparison of this file sees it."""
    x = torch.randn(4, 3, 5)

    def transposed(module: Any, input: Any, hx: Any) -> Any:
        output, (h, c) = torch.nn.LSTM.forward(module, input, hx)
        return output, (c, h)

    def batch_and_time(module: Any, input: Any, hx: Any) -> Any:
        output, states = torch.nn.LSTM.forward(module, input.transpose(0, 1).reshape(input.shape), hx)
        return output, states

    def forgets_hx(module: Any, input: Any, hx: Any) -> Any:
        return torch.nn.LSTM.forward(module, input, tuple(0 * s for s in hx))

    def directions_swapped(module: Any, input: Any, hx: Any) -> Any:
        output, states = torch.nn.LSTM.forward(module, input, hx)
        return torch.cat(output.chunk(2, dim=-1)[::-1], dim=-1), states

    for fault in (transposed, batch_and_time, forgets_hx, directions_swapped):
        ours, theirs = pair("LSTM", 5, 6, bidirectional=True)
        given = hidden("LSTM", ours, 2, 3)
        assert_same_module(ours, theirs, x, given)

        class Wrong(fastlm.nn.LSTM):
            def forward(self, input: Any, hx: Any = None, fault: Any = fault) -> Any:
                return fault(self, input, hx)

        ours.__class__ = Wrong
        with pytest.raises(AssertionError):
            assert_same_module(ours, theirs, x, given)


def test_backends_can_be_forced_through_a_module() -> None:
    ours, theirs = pair("LSTM", 5, 6)
    x = torch.randn(3, 2, 5)
    with ops.backend("torch"):
        assert torch.equal(ours(x)[0], theirs(x)[0])
