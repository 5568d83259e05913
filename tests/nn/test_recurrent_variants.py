"""fastlm.nn.LSTM and GRU with layer normalisation, recurrent dropout and zoneout: the modules around the ops."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastlm.nn
from fastlm import ops

LSTM, GRU = fastlm.nn.LSTM, fastlm.nn.GRU
EVERYTHING: dict[type, dict[str, Any]] = {
    LSTM: {"layer_norm": True, "recurrent_dropout": 0.3, "zoneout": (0.1, 0.2)},
    GRU: {"layer_norm": True, "recurrent_dropout": 0.3, "zoneout": 0.2},
}
both = pytest.mark.parametrize("kind", EVERYTHING)


def leaves(results: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]


def outputs_and_gradients(module: Any, *arguments: Any) -> list[Tensor]:
    torch.manual_seed(3)
    results = leaves(module(*arguments))
    return results + list(torch.autograd.grad([r.square().sum() for r in results], list(module.parameters())))


@both
def test_parameters_of_layer_normalisation(kind: Any) -> None:
    sizes = {"weight_ln_ih": 28, "weight_ln_hh": 28, "weight_ln_c": 7, "bias_ln_c": 7}
    if kind is GRU:
        sizes = {"weight_ln_ih": 21, "weight_ln_hh": 21}
    module = kind(5, 7, 2, bidirectional=True, layer_norm=True)
    plain = kind._torch(5, 7, 2, bidirectional=True)
    added = {name: p for name, p in module.named_parameters() if name not in plain.state_dict()}
    assert [n for n in added if n.endswith("l0_reverse")] == [f"{name}_l0_reverse" for name in sizes]
    assert len(added) == 4 * len(sizes)
    for name, parameter in added.items():
        assert parameter.shape == (sizes[name.rsplit("_l", 1)[0]],)
        assert (parameter == float(name.startswith("weight"))).all()
        torch.nn.init.normal_(parameter)
    module.reset_parameters()
    assert all((p == float(name.startswith("weight"))).all() for name, p in added.items())
    assert module.weight_hh_l0.std() > 0.1
    assert not any(name.startswith("bias") for name, _ in kind(5, 7, bias=False, layer_norm=True).named_parameters())
    half = kind(5, 7, layer_norm=True, dtype=torch.bfloat16, device="meta")
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in half.parameters())


@both
def test_the_module_is_the_op_with_its_parameters(kind: Any) -> None:
    module = kind(5, 7, 2, bidirectional=True, batch_first=True, **EVERYTHING[kind])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    x, hx = torch.randn(3, 4, 5), (torch.randn(4, 3, 7), torch.randn(4, 3, 7))
    op: Any = ops.lstm if kind is LSTM else ops.gru
    state: Any = hx if kind is LSTM else hx[0]
    for training in (True, False):
        module.train(training)
        torch.manual_seed(1)
        found = module(x, state)
        torch.manual_seed(1)
        expected = op(
            x, state, list(module._flat_weights), num_layers=2, bidirectional=True, batch_first=True,
            training=training, **EVERYTHING[kind],
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("variant", [{"layer_norm": True}, {"recurrent_dropout": 0.5}, {"zoneout": 0.25}], ids=str)
@both
def test_each_variant_acts(kind: Any, variant: dict[str, Any]) -> None:
    module = kind(5, 7, **variant)
    plain = kind(5, 7)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_ln_" not in k})
    x = torch.randn(6, 3, 5)
    assert not torch.allclose(module(x)[0], plain(x)[0])
    same = torch.equal(module.eval()(x)[0], plain(x)[0])
    assert same == ("recurrent_dropout" in variant)


def test_one_step_with_a_state_is_not_the_plain_ones() -> None:
    """The short way for one step of a plain LSTM must not be taken, once its weights are packed."""
    x, hx = torch.randn(1, 1, 5), (torch.randn(1, 1, 7), torch.randn(1, 1, 7))
    for variant in ({"layer_norm": True}, {"zoneout": 0.5}, {"recurrent_dropout": 0.9}):
        module = fastlm.nn.LSTM(5, 7, **variant)
        with torch.no_grad():
            plain = ops.lstm(x, hx, module._weights()[:4])[0]
            assert all(not torch.equal(module(x, hx)[0], plain) for _ in range(3)), variant


def test_zoneout_of_a_number_is_for_both() -> None:
    assert fastlm.nn.LSTM(5, 7, zoneout=0.25).zoneout == (0.25, 0.25)
    shown = repr(LSTM(5, 7, **EVERYTHING[LSTM]))
    assert shown == "LSTM(5, 7, layer_norm=True, recurrent_dropout=0.3, zoneout=(0.1, 0.2))"
    shown = repr(GRU(5, 7, **EVERYTHING[GRU]))
    assert shown == "GRU(5, 7, layer_norm=True, recurrent_dropout=0.3, zoneout=0.2)"
    assert repr(GRU(5, 7)) == "GRU(5, 7)"


@pytest.mark.parametrize(
    ("kind", "variant", "message"),
    [
        (LSTM, {"recurrent_dropout": 1.5}, r"^LSTM: recurrent_dropout is 1\.5, expected a probability"),
        (LSTM, {"zoneout": (0.5, -1.0)}, r"^LSTM: zoneout is -1\.0, expected a probability"),
        (GRU, {"zoneout": 1.5}, r"^GRU: zoneout is 1\.5, expected a probability"),
    ],
)
def test_refuses_what_is_no_probability(kind: Any, variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(5, 7, **variant)


@both
def test_copies_and_pickles(kind: Any) -> None:
    module = kind(5, 7, bidirectional=True, **EVERYTHING[kind]).eval()
    x = torch.randn(3, 2, 5)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    other = kind(5, 7, bidirectional=True, **EVERYTHING[kind]).eval()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False), other):
        assert torch.equal(twin(x)[0], module(x)[0])


@both
def test_packed_input_is_each_row_alone(kind: Any) -> None:
    module = kind(5, 7, 2, bidirectional=True, **EVERYTHING[kind]).eval()
    rows = [torch.randn(length, 5) for length in (3, 1, 4)]
    output, final = module(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(output)
    for index, row in enumerate(rows):
        alone, state = module(row)
        torch.testing.assert_close(padded[: lengths[index], index], alone)
        for whole, own in zip(leaves(final), leaves(state), strict=True):
            torch.testing.assert_close(whole[:, index], own)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@both
def test_compiles_without_a_graph_break(kind: Any, packed: bool, training: bool) -> None:
    """And with the same noise under the same seed as without the compiler."""
    torch._dynamo.reset()
    module = kind(5, 6, num_layers=2, bidirectional=True, dropout=0.2, **EVERYTHING[kind]).train(training)
    x: Any = torch.randn(4, 3, 5) if not packed else pack_sequence([torch.randn(n, 5) for n in (4, 3, 1)])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(leaves(compiled(x)), leaves(module(x)))
    found = outputs_and_gradients(compiled, x)
    assert all(torch.equal(a, b) for a, b in zip(found, outputs_and_gradients(compiled, x), strict=True))
    if not training:
        for a, b in zip(found, outputs_and_gradients(module, x), strict=True):
            torch.testing.assert_close(a, b)


@both
def test_the_compiled_gradient_is_of_the_compiled_forward(kind: Any) -> None:
    """The derivative along a direction, from differences under one seed, equals the gradient's."""
    torch._dynamo.reset()
    module = kind(5, 6, num_layers=2, dropout=0.5, dtype=torch.float64, **EVERYTHING[kind])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, direction = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def run(step: float) -> Tensor:
        torch.manual_seed(0)
        point = (x + step * direction).requires_grad_()
        value = compiled(point)[0].square().sum()
        return value if step else (torch.autograd.grad(value, point)[0] * direction).sum()

    torch.testing.assert_close((run(1e-6) - run(-1e-6)).detach() / 2e-6, run(0.0), rtol=1e-5, atol=1e-9)


@both
def test_it_learns(kind: Any) -> None:
    """A sequence's first sign, asked for at its end."""
    torch.manual_seed(0)
    module = kind(1, 16, layer_norm=True, recurrent_dropout=0.1, zoneout=0.05)
    head = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 0.02)
    for _ in range(60):
        x = torch.randn(8, 32, 1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(module(x)[0][-1]), (x[0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(8, 500, 1)
    right = ((head(module.eval()(x)[0][-1]) > 0) == (x[0] > 0)).float().mean()
    assert right > 0.9
