"""Training on a device: what can be shown without one, and the same front end on a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training.runs import entropy_rate, tiny_trainer, transition

from fastlm.generation import Decoder, SamplingParams
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.training import batches


def test_tokens_reach_a_gpu_from_locked_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def pin(tensor: Tensor) -> Tensor:
        seen.append("pinned")
        return tensor

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        seen.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    batches._moved(torch.zeros(2), torch.device("cuda"))
    batches._moved(torch.zeros(2), torch.device("cpu"))
    assert seen == ["pinned", ("cuda", True), ("cpu", True)]


class _NoMoving(TorchDispatchMode):
    """Refuses what takes tensors of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert len(devices) < 2, f"{func} of tensors on {devices}"
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_step_looks_at_no_value_and_keeps_to_its_device(
    kind: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which runs what any but the CPU does and has no values to wait for: all is there but the
    tokens, which are moved first."""
    trainer = tiny_trainer(kind, device="meta", optimizer=optimizer, accumulation=2)
    slices = [list(trainer._batches.slices(step)) for step in range(2)]
    monkeypatch.setattr(trainer._batches, "slices", lambda step: slices[step])
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and asked(device))
    with _NoMoving():
        trainer._train_step()
        trainer._train_step()
    assert {t.device.type for *_, loss, norm in trainer._pending for t in (loss, norm)} == {"meta"}
    slices[0] = [(inputs, torch.zeros(inputs.shape, dtype=torch.int64), state) for inputs, _, state in slices[0]]
    trainer.step = 0
    with _NoMoving(), pytest.raises((AssertionError, RuntimeError), match="meta"):  # this test can fail
        trainer._train_step()
    with pytest.raises(RuntimeError, match="meta"):
        trainer._pending[0][2].item()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_loss_scaling_changes_nothing_and_leaves_out_a_step_that_overflows(optimizer: str) -> None:
    """What float16 on a GPU needs, with the scaler for the CPU."""
    plain, scaled = (tiny_trainer("gpt", dropout=0.0, optimizer=optimizer) for _ in range(2))
    scaled.model.load_state_dict(plain.model.state_dict())
    scaled._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        plain._train_step()
        scaled._train_step()
    for ours, want in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled._pending[-1][3], plain._pending[-1][3], rtol=1e-4, atol=1e-5)
    before = [p.detach().clone() for p in scaled.model.parameters()]
    next(scaled.model.parameters()).register_hook(lambda grad: grad * torch.inf)
    scaled._train_step()
    assert all(torch.equal(p, b) for p, b in zip(scaled.model.parameters(), before, strict=True))
    assert scaled._scaler.get_scale() == 512 and not scaled._pending[-1][3].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_training_on_a_device_is_training(kind: str) -> None:
    trainer = tiny_trainer(kind, max_steps=300, device="cuda", precision="bfloat16", eval_interval=100)
    result = trainer.train()
    assert trainer.model.device.type == "cuda" and trainer.precision == "bfloat16"
    entropy = entropy_rate(transition())
    assert result.best_loss is not None and entropy - 0.1 < result.best_loss < entropy + 0.35
    tokens, decoder = generated(trainer.model)
    assert decoder.why_not_captured is None and len(tokens) == 8


def generated(model: CausalLM) -> tuple[list[int], Decoder]:
    """Eight greedy tokens, of recorded steps."""
    decoder = Decoder(model.eval(), [[1, 2, 3]], SamplingParams(max_new_tokens=8, temperature=0))
    tokens = []
    while decoder.active:
        tokens += [token.id for token in decoder.step(8)]
    return tokens, decoder


def test_the_same_front_end_on_the_cpu() -> None:
    trainer = tiny_trainer("gpt", device="cpu", max_steps=2)
    trainer.train()
    tokens, decoder = generated(trainer.model)
    assert len(tokens) == 8 and decoder.why_not_captured == native.CPU.error
