"""Training on a device: what can be shown without one, and the same front end on a real one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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


class _NoLooking(TorchDispatchMode):
    """Refuses operations after which a host would wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise AssertionError("a value is looked at")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_step_looks_at_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # These look at ids and targets on a CPU alone.
    monkeypatch.setattr(CausalLM, "check_ids", lambda model, ids: None)
    monkeypatch.setattr(sys.modules["fastlm.ops.cross_entropy"], "_check", lambda *arguments: None)
    trainer = tiny_trainer(kind)
    with _NoLooking():
        trainer._train_step()
        trainer._train_step()
        with pytest.raises(AssertionError, match="looked at"):  # this test can fail
            trainer._pending[0][2].item()


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
