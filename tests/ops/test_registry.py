"""The choice between implementations: forcing one, reasons against it, and the errors that carry them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.registry import Implementation, Op


def _too_big(x: int) -> str | None:
    return f"{x} is above 10" if x > 10 else None


@pytest.fixture
def op() -> Iterator[Op]:
    """An op whose implementations name themselves: "cpu" up to 10, "torch" for even numbers, "reference" always."""
    yield Op(
        "named",
        [
            Implementation("cpu", lambda x: ("cpu", x), _too_big),
            Implementation("torch", lambda x: ("torch", x), lambda x: "odd" if x % 2 else None),
            Implementation("reference", lambda x: ("reference", x), registry.always),
        ],
    )
    registry._OPS.pop("named", None)


def test_takes_the_first_without_a_reason(op: Op) -> None:
    assert op(3) == ("cpu", 3)
    assert op(12) == ("torch", 12)
    assert op(13) == ("reference", 13)


def test_backend_forces_and_nests(op: Op) -> None:
    with ops.backend("reference"):
        assert op(2)[0] == "reference"
        with ops.backend("torch"):
            assert op(2)[0] == "torch"
        assert op(2)[0] == "reference"
        with pytest.raises(KeyError), ops.backend("cpu"):
            raise KeyError
        assert registry.forced_backend() == "reference"
    assert op(2)[0] == "cpu"
    assert registry.forced_backend() is None


def test_a_forced_backend_that_cannot_says_why_with_all_reasons(op: Op) -> None:
    with ops.backend("cpu"), pytest.raises(NotImplementedError) as error:
        op(13)
    text = str(error.value)
    assert "backend('cpu') can't run this call" in text
    for part in ("named:", "cpu        13 is above 10", "torch      odd", "reference  can"):
        assert part in text


def test_an_op_without_the_forced_backend_chooses_as_usual(op: Op) -> None:
    with ops.backend("cuda"):
        assert op(3) == ("cpu", 3)


def test_nobody_can(op: Op) -> None:
    refusing = Op("named", [Implementation("reference", lambda x: x, lambda x: "never")])
    with pytest.raises(NotImplementedError, match=r"no implementation can run this call(.|\n)*never"):
        refusing(1)
    assert refusing.explain(1).chosen is None


def test_errors_of_an_implementation_are_not_swallowed() -> None:
    broken = Op(
        "named",
        [
            Implementation("cpu", lambda x: 1 // 0, registry.always),
            Implementation("reference", lambda x: x, registry.always),
        ],
    )
    try:
        with pytest.raises(ZeroDivisionError):
            broken(1)
    finally:
        registry._OPS.pop("named")


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match=r"backend: 'gpu' is not one of reference, torch, cpu, triton, cuda"),
        ops.backend("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match=r"unknown backend names \['gpu'\]"):
        Op("named", [Implementation("gpu", id, registry.always), Implementation("reference", id, registry.always)])
    with pytest.raises(ValueError, match="has no reference"):
        Op("named", [Implementation("cpu", id, registry.always)])
    assert "named" not in registry.all_ops()
    with pytest.raises(ValueError, match=r"explain: 'rms_nrom' is not one of .*rms_norm"):
        ops.explain("rms_nrom", torch.randn(2))
    with pytest.raises(ValueError, match="explain: 'explain' is not one of"):
        ops.explain("explain")
    with pytest.raises(ValueError, match=r"is not an op of fastlm\.ops"):
        ops.explain(torch.relu, torch.randn(2))


def test_explain_by_name_and_by_function_without_computing() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    by_name, by_function = ops.explain("rms_norm", x), ops.explain(ops.rms_norm, x)
    assert by_name == by_function
    assert by_name.chosen == "torch"
    assert dict(by_name.reasons)["reference"] is None
    with ops.backend("reference"):
        assert ops.explain("rms_norm", x).chosen == "reference"
    assert "-> torch" in str(by_name)


def test_explain_checks_the_arguments_and_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="rms_norm: weight"):
        ops.explain("rms_norm", torch.randn(2, 3), torch.randn(4))
    assert isinstance(ops.rms_norm(torch.randn(2, 3)), torch.Tensor)


def test_a_thread_does_not_see_anothers_choice(op: Op) -> None:
    seen: list[str] = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(op(2)[0]))
        thread.start()
        thread.join()
        assert op(2)[0] == "reference"
    assert seen == ["cpu"]


def test_every_op_is_public_documented_and_known_to_torch() -> None:
    for name in registry.all_ops():
        function = getattr(ops, name)
        assert name in ops.__all__
        assert "Raises:" in function.__doc__, name
        # To torch.compile two are the custom op of attention, and greedy, whose screen is no tensor, its reference.
        assert hasattr(torch.ops.fastlm, name) or name in ("attention_lse", "attention_varlen", "greedy"), name
