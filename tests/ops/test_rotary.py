"""ops.rotary and the tables of nn.Rotary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.gptj.modeling_gptj import rotate_every_two
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fastlm import ops
from fastlm.nn.rotary import Rotary
from fastlm.reference import rotary as reference

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def compare(rotate: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """The comparison of this suite, which every planted fault must turn red."""
    rotated = 2 * cos.shape[-1]
    head = x[..., :rotated].double()
    c, s = (t.double().expand(x.shape[0], -1, -1) for t in (cos, sin))
    if interleaved:
        c, s = (t.repeat_interleave(2, dim=-1)[:, None] for t in (c, s))
        turned = head * c + rotate_every_two(head) * s
    else:
        turned = apply_rotary_pos_emb(head, head, torch.cat((c, c), -1), torch.cat((s, s), -1))[0]
    exact = torch.cat((turned, x[..., rotated:].double()), dim=-1)
    same = reference.rotary(x, cos, sin, interleaved)
    assert_close_to_reference(rotate(x, cos, sin, interleaved=interleaved), same, exact)
    assert_close_to_reference(same, exact.to(x.dtype), exact, floor=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [2, 6, 8])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_transformers(interleaved: bool, rotated: int, per_sequence: bool, dtype: torch.dtype) -> None:
    positions = torch.randint(0, 500, (2, 5) if per_sequence else (5,))
    cos, sin = Rotary(rotated).tables(positions)
    x = torch.randn(2, 5, 3, 8).to(dtype).transpose(1, 2)
    compare(ops.rotary, x, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 16, 30, 64, 129])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_native_equals_the_reference_bit_by_bit(
    isa: str, monkeypatch: pytest.MonkeyPatch, interleaved: bool, dim: int, per_sequence: bool
) -> None:
    # Nothing is fused, so no level, place, batch or thread count can change a bit.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: empty_like(*a, **o).fill_(torch.nan))
    whole = torch.randn(2, 40, 3, 2 * dim)
    for half in {0, dim // 2, dim // 3}:
        cos, sin = torch.randn(2, *((2, 40, half) if per_sequence else (40, half)))
        for x in (whole[..., :dim], whole[..., ::2], whole[:, :, 1:2, dim:]):
            x = x.transpose(1, 2)
            with ops.backend("cpu"):
                got = ops.rotary(x, cos, sin, interleaved=interleaved)
            assert torch.equal(got, reference.rotary(x, cos, sin, interleaved))


def test_native_steps_aside(isa: str) -> None:
    x, (cos, sin) = torch.randn(1, 1, 5, 8), Rotary(8).tables(torch.arange(5))
    assert ops.explain(ops.rotary, x, cos, sin).chosen == "cpu"
    for inputs in ((x.requires_grad_(), cos, sin), (x.detach().double(), cos, sin), (x.detach().bfloat16(), cos, sin)):
        assert ops.explain(ops.rotary, *inputs).chosen == "reference"
    x = x.detach()
    turned = torch.func.vmap(lambda x: ops.rotary(x, cos, sin))(x[None])
    assert torch.equal(turned[0], ops.rotary(x, cos, sin))
    _, tangent = torch.func.jvp(lambda x: ops.rotary(x, cos, sin), (x,), (x,))
    assert torch.equal(tangent, ops.rotary(x, cos, sin))  # it is linear


FAULTS: dict[str, Callable[..., Tensor]] = {
    "zeros": lambda x, c, s, **o: torch.zeros_like(x),
    "not rotated": lambda x, c, s, **o: x,
    "turned backwards": lambda x, c, s, **o: ops.rotary(x, c, -s, **o),
    "other pairing": lambda x, c, s, interleaved: ops.rotary(x, c, s, interleaved=not interleaved),
    "one position late": lambda x, c, s, **o: ops.rotary(x, c.roll(1, -2), s.roll(1, -2), **o),
    "frequencies reversed": lambda x, c, s, **o: ops.rotary(x, c.flip(-1), s.flip(-1), **o),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(2, 3, 5, 8), Rotary(8).tables(torch.arange(5))
    compare(ops.rotary, x, cos, sin, interleaved)
    with pytest.raises(AssertionError):
        compare(FAULTS[fault], x, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    rotary = Rotary(8, interleaved=interleaved).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(m: int, n: int) -> Tensor:
        return (rotary(q, *rotary.tables(torch.tensor([m]))) * rotary(k, *rotary.tables(torch.tensor([n])))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)  # float32 tables
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, LLAMA3],
)
def test_tables_equal_transformers_bit_by_bit(scaling: dict[str, Any] | None) -> None:
    parameters = {"rope_theta": 50000.0, "rope_type": "default"}
    parameters.update({"rope_type" if key == "type" else key: value for key, value in (scaling or {}).items()})
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=parameters
    )
    positions = torch.arange(2048)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    got = Rotary(32, base=50000.0, scaling=scaling).tables(positions)
    assert torch.equal(torch.cat((got[0], got[0]), -1), cos[0])
    assert torch.equal(torch.cat((got[1], got[1]), -1), sin[0])


def test_module_keeps_no_state_and_float32_tables() -> None:
    rotary = Rotary(8)
    assert not rotary.state_dict()
    assert not list(rotary.parameters())
    before = rotary.tables(torch.tensor([[3, 400]]))
    after = rotary.to(torch.bfloat16).tables(torch.tensor([[3, 400]]))  # a rounded frequency turns far positions wrong
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        assert b.dtype == torch.float32
        assert b.shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_dim": 5}, "rotary_dim is 5, expected an even number"),
        ({"rotary_dim": 4, "scaling": {"rope_type": "yarn"}}, "rope_type 'yarn', expected default, linear or llama3"),
        ({"rotary_dim": 4, "scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rotary_dim": 4, "scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    ],
)
def test_module_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^Rotary: .*" + message):
        Rotary(**options)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.fastlm.rotary.default, (x, cos, sin, interleaved, None))
    tables = (torch.randn(9, 3, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.fastlm.rotary.default, (x, *tables, interleaved, torch.tensor([0, 4])))


@pytest.mark.parametrize("interleaved", [False, True])
def test_starts_choose_rows_of_the_tables(interleaved: bool, isa: str) -> None:
    x, starts = torch.randn(3, 4, 2, 10), torch.tensor([5, 0, 11])
    cos, sin = torch.randn(13, 4), torch.randn(13, 4)
    places = starts[:, None] + torch.arange(2)
    want = ops.rotary(x, cos[places], sin[places], interleaved=interleaved)
    for backend in ("cpu", "reference"):
        with ops.backend(backend):
            got = ops.rotary(x, cos, sin, interleaved=interleaved, starts=starts)
        assert torch.equal(got, want), backend
    shifted = ops.rotary(x, cos, sin, interleaved=interleaved, starts=starts - torch.tensor([1, 0, 0]))
    assert not torch.equal(shifted[0], want[0]) and torch.equal(shifted[1:], want[1:])


def test_starts_that_do_not_fit_are_named() -> None:
    x, cos = torch.randn(2, 1, 3, 8), torch.randn(9, 4)
    with pytest.raises(IndexError, match="starts has 7, expected 0 to 6"):
        ops.rotary(x, cos, cos, starts=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"starts is int32 \[2\]"):
        ops.rotary(x, cos, cos, starts=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cos is .*expected shape \[P, R/2\]"):
        ops.rotary(x, cos[None], cos[None], starts=torch.tensor([0, 1]))


def test_compiles_in_one_graph() -> None:
    rotary = Rotary(6)
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return rotary(x, *rotary.tables(torch.arange(5)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    upstream = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x, upstream), torch.autograd.grad(run(x), x, upstream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(2, 5, 8)}, r"input is .*expected shape \[B, H, T, D\]"),
        ({"cos": torch.randn(4, 4)}, r"cos is float32 \[4, 4\] on cpu, expected shape \[5, R/2\] or \[2, 5, R/2\]"),
        ({"sin": torch.randn(5, 3)}, "sin is"),
        ({"sin": torch.randn(2, 5, 4)}, "sin is .*the same for cos and sin"),
        ({"cos": torch.randn(5, 5), "sin": torch.randn(5, 5)}, "cos is .*with R <= 8"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    call = {"input": torch.randn(2, 3, 5, 8), "cos": torch.randn(5, 4), "sin": torch.randn(5, 4)}
    with pytest.raises(ValueError, match=r"^rotary: " + message):
        ops.rotary(**{**call, **change})
