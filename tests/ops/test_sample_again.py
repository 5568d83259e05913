"""`fastlm.ops.sample` called again and again: what is remembered of a checked call never decides wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import sample as kernel

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


def _reference(logits: Tensor, **options: Any) -> Tensor:
    with ops.backend("reference"):
        return ops.sample(logits, **options)


@needs_native
@pytest.mark.parametrize("shape", [(1, 300), (3, 300)])
def test_the_same_call_again_gives_what_the_first_would(shape: tuple[int, int]) -> None:
    """What was found out for the same options is used again; everything else is looked at anew."""
    logits = torch.randn(shape) * 3
    base: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    changes: list[dict[str, Any]] = [{}, {"top_k": 2}, {"min_p": 0.2}, {"seed": 4}, {"sequence": 9}, {"temperature": 2}]
    for changed in (*changes, {"logit_bias": {5: 50.0}}, *changes):
        for position in (0, 7, 2**32 - 1):
            options = {**base, **changed, "position": position}
            for values in (logits, -logits, logits.double(), torch.randn(shape[1], shape[0]).T):
                assert torch.equal(ops.sample(values, **options), _reference(values, **options)), options


@needs_native
def test_the_same_call_again_still_refuses() -> None:
    logits = torch.randn(2, 50)
    for _ in range(2):
        ops.sample(logits, seed=1, position=3)
    for position in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match="sample: position is"):
            ops.sample(logits, seed=1, position=position)
    logits[1, 4] = torch.nan
    with pytest.raises(ValueError, match="sample: row 1: the logit of token 4 is NaN"):
        ops.sample(logits, seed=1, position=3)
    with pytest.raises(TypeError, match="sample: top_k is a list"):
        ops.sample(logits, top_k=[1], position=3)  # type: ignore[arg-type]


@needs_native
def test_what_is_no_plain_call_is_not_known() -> None:
    if kernel.known is None:
        pytest.skip("torch shows no tensors to native code")

    class Sub(Tensor):
        pass

    class Number(float):
        pass

    x = torch.randn(2, 40)
    kernel.forget()
    expected = ops.sample(x, temperature=0.8, seed=2**64 - 1, position=3)
    call = (x, 0.8, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 2**64 - 1, None, 3, 1)
    known = kernel.known(*call)
    assert known is not None and torch.equal(known, expected)
    assert kernel.known(*call[:1], float("0.8"), *call[2:]) is not None  # an equal number in another object
    others: list[tuple[int, object]] = [
        (0, x.as_subclass(Sub)),  # type: ignore[no-untyped-call]
        (0, x.to("meta")),
        (0, x.double()),
        (0, x[:1]),
        (0, x[:, :39]),
        (0, x.T.contiguous().T),
        (0, x[0]),
        (0, None),
        (1, Number(0.8)),
        (1, torch.tensor(0.8)),
        (1, 0.7),
        (2, 1),  # equal, of another type
        (3, "no number"),
        (7, 1),
        (8, 2**64 - 2),
        (9, 0),
        (10, -1),
        (10, 2**32),
        (10, 2**70),
        (10, 3.0),
        (10, True),
        (10, torch.tensor(3)),
    ]
    for place, other in others:
        assert kernel.known(*call[:place], other, *call[place + 1 :]) is None, (place, other)
    with pytest.raises(TypeError, match="expected 12"):
        kernel.known(*call[:-1])
    with pytest.raises(TypeError):
        kernel.known(*call[:-1], "two")
    x[0, 0] = torch.nan
    assert kernel.known(*call) is None
    assert kernel.forget() == 1
    assert kernel.known(*call) is None
    for seed in range(70):  # more than are kept
        ops.sample(x.nan_to_num(), seed=seed)
    assert kernel.forget() == 64


@needs_native
@pytest.mark.parametrize("blind_to", ["temperature", "top_k", "sequence", "shape"])
def test_planted_fault_calls_taken_for_like_are_found(blind_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"temperature": 1, "top_k": 7, "sequence": 9}.get(blind_to)
    first: list[Any] = []

    def blind(*call: Any) -> Tensor | None:
        first[:] = first or call
        logits = call[0][:, :200] if place is None else call[0]
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        names = (*names, "top_k", "seed", "sequence")
        options = {name: (first if at == place else call)[at] for at, name in enumerate(names, 1)}
        return _reference(logits, **options, position=call[10])

    monkeypatch.setattr(kernel, "known", blind)
    with pytest.raises(AssertionError):
        test_the_same_call_again_gives_what_the_first_would((1, 300))


@needs_native
def test_options_in_tensors_are_read_each_time() -> None:
    logits = torch.randn(2, 50)
    top_k = torch.tensor([1, 1])
    first = ops.sample(logits, top_k=top_k, temperature=5.0, seed=1, position=3)
    top_k[:] = 0
    again = [ops.sample(logits, top_k=top_k, temperature=5.0, seed=1, position=at) for at in range(20)]
    assert any(not torch.equal(first, other) for other in again)


@needs_native
def test_fake_tensors_give_fake_tensors() -> None:
    logits = torch.randn(2, 50)
    ops.sample(logits, seed=1, position=3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(logits)
        for values in (logits, fake):
            tokens = ops.sample(values, seed=1, position=3)
            assert type(tokens) is FakeTensor
            assert tokens.shape == (2,)
            assert tokens.dtype == torch.int64
    reasons = dict(ops.explain("sample", fake).reasons)
    assert reasons["cpu"] == "logits are a FakeTensor; the kernel takes plain tensors"
