"""Calls of ops.attention_decode that native code knows from before, and those that it must not take for known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_cases import compare, make_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastlm import ops
from fastlm.kernels import native
from fastlm.kernels.cpu import attention_decode as kernel


def _repeated(change: str) -> None:
    """Inference asks again with other tensors, of which one thing differs: it must not get what was found before."""
    kernel.forget()
    args, options = make_case(2, 4, 2, 3, 10, [7, 9], 12)
    wide = torch.randn(2, 4, 3, 20)
    with torch.no_grad():
        for _ in range(2):
            compare(ops.attention_decode, args, options)
            query, keys, values, lengths = args
            changed = {
                "nothing": args,
                "values": (torch.randn_like(query), keys.clone(), values.clone(), lengths - 1),
                "query strides": (wide[..., :10], keys, values, lengths),
                "cache strides": (query, torch.randn(4, 12, 2, 10).transpose(1, 2), values, lengths),
                "value strides": (query, keys, torch.randn(4, 12, 2, 10).transpose(1, 2), lengths),
                "batch": (query[:1], keys, values, lengths[:1]),
                "tokens": (query[:, :, :1], keys, values, lengths),
                "positions": (query, keys[:, :, :10], values[:, :, :10], lengths),
            }
            others = {
                "scale": {"scale": 0.3},
                "window": {"window": 4},
                "softcap": {"softcap": 2.0},
                "slopes": {"alibi_slopes": torch.rand(4)},
                "no rows": {"rows": None},
            }
            more = {**options, **others.get(change, {})}
            if change == "batch":
                more["rows"] = more["rows"][:1]
            if change == "no rows":
                keys, values = keys.nan_to_num(), values.nan_to_num()
                changed[change] = (query, keys, values, lengths)
            compare(ops.attention_decode, changed.get(change, args), more)
        same = change in ("nothing", "values", "slopes") or not native.shows_tensors()
        assert kernel.forget() == native.shows_tensors() * (1 if same else 2)
        # What was found of the shapes says nothing of the numbers.
        with pytest.raises(ValueError, match=r"lengths\[1\] is 13, expected from 3 .* to 12"):
            ops.attention_decode(*args[:3], torch.tensor([7, 13]), **options)
        with pytest.raises(ValueError, match=r"lengths is .*int32"):
            ops.attention_decode(*args[:3], args[3].int(), **options)


_CHANGES = [
    *("nothing", "values", "query strides", "cache strides", "value strides", "batch", "tokens", "positions"),
    *("scale", "window", "softcap", "slopes", "no rows"),
]


@pytest.mark.parametrize("change", _CHANGES)
def test_what_was_found_for_a_call_serves_calls_like_it_alone(change: str) -> None:
    _repeated(change)


@pytest.mark.parametrize("change", ["query strides", "window", "tokens"])
def test_planted_fault_calls_taken_for_like_are_found(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[Any] = []

    def blind(*call: Any) -> Tensor | None:
        """The first call's layout and options for all that follow."""
        if not first:
            first.extend(call)
            return None
        query, keys, values, lengths, rows = (
            None if now is None else now.as_strided(then.shape, then.stride())
            for now, then in zip(call[:5], first[:5], strict=True)
        )
        scale = query.shape[3] ** -0.5
        return kernel.attention_decode(query, keys, values, lengths, rows, scale, *first[6:8], None)

    monkeypatch.setattr(kernel, "known", blind)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        _repeated(change)


def test_a_known_call_takes_its_tensors_as_they_are_now() -> None:
    """Tensors that change their memory or their layout in place, that want gradients, that are of a subclass."""
    if not native.shows_tensors():
        pytest.skip("torch shows no tensors to native code")
    args, options = make_case(2, 4, 2, 3, 10, [7, 9], 12)
    query, keys, _, lengths = args
    kernel.forget()
    with torch.no_grad():
        compare(ops.attention_decode, args, options)
        assert kernel.known(*args, options["rows"], None, None, None, 2) is not None
        query.set_(torch.randn(2, 4, 3, 10))  # other memory under the same object
        compare(ops.attention_decode, args, options)
        keys.transpose_(1, 2).transpose_(1, 2)
        lengths.sub_(1)
        compare(ops.attention_decode, args, options)
        query.set_(torch.randn(2, 3, 4, 10).transpose(1, 2))
        compare(ops.attention_decode, args, options)
        parameter = torch.nn.Parameter(query)
        compare(ops.attention_decode, (parameter, *args[1:]), options)
        assert kernel.forget() == 2
    for tensor in args[:3]:
        tensor.requires_grad_()
    leaf = ops.attention_decode(*args, **options)
    assert leaf.requires_grad
    with torch.inference_mode():
        compare(ops.attention_decode, args, options)
    assert kernel.forget() == 1


def test_what_is_no_plain_call_is_not_known() -> None:
    if not native.shows_tensors():
        pytest.skip("torch shows no tensors to native code")

    class Sub(Tensor):
        pass

    args, options = make_case(2, 4, 2, 3, 10, [7, 9], 12)
    query, keys, values, lengths = args
    plain = (*args, options["rows"], 0.5, None, None)
    with torch.no_grad():
        ops.attention_decode(*args, rows=options["rows"], scale=0.5)
        assert kernel.known(*plain, 1) is not None
        for place, other in (
            (0, query.as_subclass(Sub)),  # type: ignore[no-untyped-call]
            (0, query.to("meta")),
            (0, query.to_sparse()),
            (0, query.double()),
            (0, None),
            (0, query[None]),
            (0, 3),
            (1, keys.bfloat16()),
            (2, values[:, :, :11]),
            (3, lengths.int()),
            (4, None),
            (5, 0.25),
            (5, None),
            (5, float("nan")),
            (5, "no number"),
            (6, 3),
            (7, 0.5),
        ):
            assert kernel.known(*plain[:place], other, *plain[place + 1 :], 1) is None, (place, other)
        with pytest.raises(TypeError, match="9"):
            kernel.known(*plain)
        with pytest.raises(TypeError):
            kernel.known(*plain, "two")
        for _ in range(70):  # more layouts than are kept
            positions = 12 + _
            caches = torch.randn(2, 4, 2, positions, 10)
            compare(ops.attention_decode, (query, *caches, lengths), options)
        assert kernel.known(*plain, 1) is None
        compare(ops.attention_decode, args, options)
    assert kernel.forget() == 64


def test_fake_tensors_give_fake_tensors() -> None:
    args, options = make_case(2, 4, 2, 3, 10, [7, 9], 12)
    with torch.no_grad():
        real = ops.attention_decode(*args, **options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = ops.attention_decode(*(mode.from_tensor(t) for t in args), rows=mode.from_tensor(options["rows"]))
            of_real = ops.attention_decode(*args, **options)  # of a call that is known, in a mode without new memory
        unknown = tuple(torch.randn(2, 1, 1, 11) for _ in range(3))
        with FakeTensorMode(allow_non_fake_inputs=True):
            first = ops.attention_decode(*unknown, torch.tensor([1, 1]))
    assert type(first) is FakeTensor
    for found in (fake, of_real):
        assert type(found) is FakeTensor
        assert found.shape == real.shape
        assert found.dtype == real.dtype


@pytest.mark.parametrize("offered", [None, 1, object()])
def test_an_interface_of_another_kind_is_not_used(offered: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", offered, raising=False)
    assert native.shows_tensors.__wrapped__() is False
    monkeypatch.undo()
    compare(ops.attention_decode, *make_case(2, 4, 2, 1, 10, [7, 9], 12))  # what was taken before still serves
