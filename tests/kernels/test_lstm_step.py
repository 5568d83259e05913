"""Steps of an LSTM whose weights are packed, from the look at the weights to the results in native code."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.kernels import native, packing
from fastlm.kernels.cpu import lstm

pytestmark = pytest.mark.skipif(
    native.CPU.module is None or not native.shows_tensors(), reason="native code cannot look at tensors"
)
State = tuple[Tensor, Tensor]


class Steps:
    """A layer, one step's arguments, and how often native code has served it."""

    def __init__(self, batch: int = 3, inputs: int = 20, hidden: int = 33, bias: bool = True) -> None:
        self.layer = fastlm.nn.LSTM(inputs, hidden, bias=bias).eval()
        self.x = torch.randn(1, batch, inputs)
        self.state = (torch.randn(1, batch, hidden), torch.randn(1, batch, hidden))
        self.served = 0
        self()
        self._count()

    def __call__(self, x: Tensor | None = None, state: State | None = None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            output, (h, c) = self.layer(self.x if x is None else x, self.state if state is None else state)
        return output, h, c

    @property
    def weights(self) -> list[Any]:
        weights: list[Any] = self.layer._weights()
        return weights + [None] * (4 - len(weights))

    def prepared(self) -> Any:
        return packing.remembered("lstm prepared", self.weights)

    def _count(self) -> None:
        prepared = self.prepared()
        step = prepared.step

        def counting(*args: Any) -> Any:
            found = step(*args)
            self.served += found is not None
            return found

        prepared.step = counting

    def general(self, x: Tensor | None = None, state: State | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """By the layer's kernel, which looks at everything anew."""
        x, (h, c) = self.x if x is None else x, self.state if state is None else state
        packing.clear()
        with torch.no_grad():
            output, h, c, _ = lstm.layer_forward(x[0], [x.shape[1]], *self.weights, None, h[0], c[0], False, False)
        return output[None], h[None], c[None]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_serves_steps_with_the_same_bits(batch: int, bias: bool) -> None:
    steps = Steps(batch, bias=bias)
    found = steps()
    assert steps.served == 1
    assert len({t.data_ptr() for t in found}) == 3  # a caller may write to any of them
    second = steps(torch.randn_like(steps.x), found[1:])
    assert steps.served == 2
    assert not torch.equal(second[0], found[0])
    assert same(found, steps.general())


def test_serves_cells() -> None:
    steps = Steps()
    x, h, c = (t[0] for t in (steps.x, *steps.state))
    with torch.no_grad():
        found = ops.lstm_cell(x, (h, c), *steps.weights)
    assert steps.served == 1
    assert same(found, tuple(t[0] for t in steps.general()[1:]))


def add(weight: Any) -> None:
    with torch.no_grad():
        weight.add_(0.5)


def replace_data(weight: Any) -> None:
    weight.data = weight.data * 0.5


def write_past_autograd(weight: Any) -> None:
    weight.data.mul_(0.5)


@pytest.mark.parametrize("change", [add, replace_data, write_past_autograd])
@pytest.mark.parametrize("which", range(4))
def test_notices_changed_weights(change: Callable[[Any], None], which: int) -> None:
    steps = Steps()
    before = steps()
    change(steps.weights[which])
    found = steps()
    assert steps.served == 1  # before the change, not since
    assert not torch.equal(found[0], before[0])
    assert same(found, steps.general())


def test_what_it_cannot_serve_is_looked_at_in_python() -> None:
    steps = Steps()
    apart = torch.stack([steps.x] * 2, -1)[..., 0]
    assert same(steps(apart), steps())
    assert steps.served == 1
    for x in (steps.x.double(), steps.x[..., 1:], steps.x[:0]):
        with pytest.raises((RuntimeError, ValueError)):
            steps(x)
    with pytest.raises(RuntimeError, match="hidden"):
        steps(steps.x, tuple(t[..., 1:].contiguous() for t in steps.state))  # type: ignore[arg-type]
    assert steps.served == 1


def test_gradients_are_not_lost() -> None:
    steps = Steps()
    output, _ = steps.layer(steps.x, steps.state)
    assert steps.served == 0
    assert output.requires_grad


def test_rows_too_unlike_for_digits_are_served_from_the_second_on() -> None:
    steps = Steps(4)
    x = steps.x.clone()
    x[0, 1, 7] = 500.0
    first = steps(x)
    steps._count()  # the step has got parts of the weights besides
    served = steps.served
    second = steps(x)
    assert steps.served > served
    assert same(first, second)
    assert same(first, steps.general(x))
    assert same(steps(), steps.general())


@pytest.mark.skipif(
    native.CPU.module is None or not packing.digit_tiles(), reason="weights come as parts where there are tiles"
)
def test_parts_once_given_are_kept() -> None:
    """Another thread's step may be reading them, which has let go of the interpreter."""
    steps = Steps()
    prepared = steps.prepared()
    first = weakref.ref(prepared.parts(steps.weights[0]))
    packing.clear()
    second = prepared.parts(steps.weights[0])
    assert first() is not None and first() is not second


def test_results_do_not_depend_on_threads() -> None:
    steps = Steps(2, 300, 300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(steps())
    finally:
        torch.set_num_threads(before)
    assert steps.served == 3
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_keeps_no_weights_alive() -> None:
    layer = fastlm.nn.LSTM(8, 8)
    state = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(1, 1, 8), state)
    gone = weakref.ref(layer.weight_ih_l0)
    del layer
    gc.collect()
    assert gone() is None


def test_arguments_are_checked() -> None:
    steps = Steps()
    packing.clear()
    steps()
    step = steps.prepared().step
    with pytest.raises(TypeError, match="expected 9"):
        step(*steps.weights)
    assert step(*steps.weights, None, None, None, True, 1) is None
    begin = native.CPU.require().lstm_step_begin
    with pytest.raises(ValueError, match="cannot read"):
        begin([w.double() for w in steps.weights], torch.empty_like)
