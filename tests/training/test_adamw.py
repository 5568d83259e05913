"""AdamW: the formula, torch's own beside it, one state for both, and bits that nothing but the data decides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_reference
from torch import Tensor, nn

import fastlm.training.adamw as module
from fastlm.kernels import native
from fastlm.reference import adamw as reference
from fastlm.training import AdamW

needs_native = pytest.mark.skipif(native.CPU.module is None, reason="the native module is not built")
_GROUPS = ({"lr": 3e-2, "weight_decay": 0.2}, {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6})


def _problem(shapes: list[tuple[int, ...]], steps: int = 3) -> tuple[list[Tensor], list[list[Tensor]]]:
    return [torch.randn(s) for s in shapes], [[torch.randn(s) * 2 for s in shapes] for _ in range(steps)]


def _run(kind: Any, weights: list[Tensor], gradients: list[list[Tensor]], max_norm: float | None) -> list[Tensor]:
    """The weights after all steps; every second one is of the other group."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = kind([{"params": parameters[i::2], **_GROUPS[i]} for i in range(2) if parameters[i::2]])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.dtype).clone()
        if kind is AdamW:
            optimizer.step(max_norm=max_norm)
            every = torch.cat([g.flatten() for g in step])
            assert optimizer.norm.item() == pytest.approx(every.norm().item(), rel=1e-5)
        else:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
    return [p.detach() for p in parameters]


def _exact(weights: list[Tensor], gradients: list[list[Tensor]], max_norm: float | None) -> list[Tensor]:
    states = [(w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()) for w in weights]
    for t, step in enumerate(gradients, 1):
        _, factor = reference.clip_factor([g.double() for g in step], max_norm)
        for i, g in enumerate(step):
            options = {"betas": (0.9, 0.999), "eps": 1e-8, **_GROUPS[i % 2]}
            rate, decay = options.pop("lr"), options.pop("weight_decay")
            p, m, v = states[i]
            states[i] = reference.adamw(p, g.double() * factor, m, v, t, rate=rate, decay=decay, **options)
    return [p for p, _, _ in states]


def test_the_reference_is_torchs() -> None:
    weights, gradients = _problem([(5, 3), (7,)])
    wide = [w.double() for w in weights]
    for found, expected in zip(
        _exact(weights, gradients, 1.0), _run(torch.optim.AdamW, wide, gradients, 1.0), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # torch's norm is of norms


def _compare(found: list[Tensor], weights: list[Tensor], gradients: list[list[Tensor]], max_norm: float | None) -> None:
    same = _run(torch.optim.AdamW, weights, gradients, max_norm)
    for a, b, exact in zip(found, same, _exact(weights, gradients, max_norm), strict=True):
        assert_close_to_reference(a, b, exact, floor=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([(), (1,), (3, 5), (16,), (4, 33), (8192,), (90, 100)]), min_size=1, max_size=5),
    max_norm=st.sampled_from([None, 0.3, 1e6]),
)
def test_within_the_bound(sizes: list[tuple[int, ...]], max_norm: float | None) -> None:
    weights, gradients = _problem(sizes)
    _compare(_run(AdamW, weights, gradients, max_norm), weights, gradients, max_norm)


@pytest.mark.parametrize("fault", ["zeros", "no decay", "no clipping", "no correction", "betas swapped"])
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = _problem([(12, 7), (40,)])
    _compare(_run(AdamW, weights, gradients, 0.5), weights, gradients, 0.5)
    kernel = module.adamw

    def wrong(calls: Any, max_norm: float | None) -> float:
        changed = []
        for tensors, (rate, decay, beta1, beta2, eps) in calls:
            if fault == "no decay":
                decay = 0.0
            elif fault == "betas swapped":
                beta1, beta2 = beta2, beta1
            if fault == "no correction":
                for t in tensors:
                    t.steps.fill_(1e6)
            changed.append((tensors, (rate, decay, beta1, beta2, eps)))
        norm = kernel(changed, None if fault == "no clipping" else max_norm)
        if fault == "zeros":
            for tensors, _ in calls:
                for t in tensors:
                    t.parameter.zero_()
        return norm

    monkeypatch.setattr(module, "adamw", wrong)
    with pytest.raises(AssertionError):
        _compare(_run(AdamW, weights, gradients, 0.5), weights, gradients, 0.5)


@needs_native
def test_same_bits_for_any_threads_and_place(isa: str) -> None:
    weights, gradients = _problem([(90, 1000), (17,), (33, 9)])
    expected = _run(AdamW, weights, gradients, 0.7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, _run(AdamW, weights, gradients, 0.7), expected))
    finally:
        torch.set_num_threads(threads)
    shifted = [torch.randn(w.numel() + 1)[1:].view(w.shape).copy_(w) for w in weights]  # off any alignment
    assert all(map(torch.equal, _run(AdamW, shifted, gradients, 0.7), expected))


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("ours_first", [True, False])
def test_torch_and_ours_go_on_with_each_others_state(ours_first: bool, fused: bool | None) -> None:
    def theirs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=fused)

    def ours(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AdamW(parameters, lr=1e-2, weight_decay=0.1)

    weights, gradients = _problem([(6, 5), (9,)], steps=4)
    parameters = [nn.Parameter(w) for w in weights]
    straight = [nn.Parameter(w.clone()) for w in weights]
    whole = theirs(straight)
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    optimizer = first(parameters)
    for t, step in enumerate(gradients):
        if t == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = second(parameters)
            assert optimizer.state_dict()["param_groups"][0].keys() == saved["param_groups"][0].keys()
            optimizer.load_state_dict(saved)
        for p, q, gradient in zip(parameters, straight, step, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        whole.step()
    for p, q in zip(parameters, straight, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for p, q in zip(optimizer.state.values(), whole.state.values(), strict=True):
        assert p.keys() == q.keys() and p["step"] == q["step"] == 4 and p["step"].dtype is q["step"].dtype


@needs_native
def test_versions_tell_that_weights_changed() -> None:
    parameter = nn.Parameter(torch.randn(3))
    kept = (parameter * parameter).sum()
    parameter.grad = torch.ones(3)
    before = parameter._version
    AdamW([parameter]).step()
    assert parameter._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_other_tensors_take_torchs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "adamw", lambda *_: pytest.fail("the native kernel was called"))
    for make in (lambda: torch.randn(4, 3, dtype=torch.float64), lambda: torch.randn(3, 4).t()):
        weight, gradient = make(), make() * 5
        found = _run(AdamW, [weight], [[gradient]], 0.5)[0]
        torch.testing.assert_close(found, _run(torch.optim.AdamW, [weight], [[gradient]], 0.5)[0])


def test_hooks_closures_and_missing_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, called = AdamW([used, unused], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    assert optimizer.step() is None and optimizer.norm == 0

    def closure() -> float:
        optimizer.zero_grad()
        loss = (used * 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert called == [1, 1]
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(3))
    assert unused not in optimizer.state


def test_what_it_cannot_do_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"max_norm: 0.0, expected a positive number"):
        optimizer.step(max_norm=0.0)
    optimizer.load_state_dict(torch.optim.AdamW([parameter], amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="amsgrad: True in a parameter group"):
        optimizer.step()


def test_state_of_another_shape_is_refused() -> None:
    small, large = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(20, 30))
    other = torch.optim.AdamW([small])
    small.grad = torch.ones(2, 3)
    other.step()
    optimizer = AdamW([large])
    optimizer.load_state_dict(other.state_dict())
    large.grad = torch.ones(20, 30)
    with pytest.raises(ValueError, match=r"exp_avg: \[2, 3\] in the state, expected \[20, 30\]"):
        optimizer.step()


def test_an_empty_parameter_is_no_obstacle() -> None:
    empty, other = nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(3))
    empty.grad, other.grad = torch.ones(0, 4), torch.ones(3)
    AdamW([empty, other], lr=0.1).step(max_norm=1.0)
    assert other[0] < 1


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_unclipped_what_is_not_finite_stays_in_its_place(bad: float) -> None:
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    one.grad, other.grad = torch.tensor([1.0, bad, 1.0]), torch.ones(2)
    AdamW([one, other], lr=0.1).step()
    assert one[[0, 2]].isfinite().all() and other.isfinite().all()
