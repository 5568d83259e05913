"""Which tokens each step sees, as a function of the step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.data.tokens import ContiguousBatches, Tokens, random_blocks
from fastlm.models.base import CausalLM
from fastlm.nn.state import RecurrentState
from fastlm.training.config import TrainingConfig


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From page-locked memory, so that copying to a GPU does not make the host wait, which then
    gathers the next step's tokens while the GPU is busy with this one's; torch gives such memory out again only when
    the copy is done."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class RandomBlocks:
    """Blocks from random places, each step's drawn from (seed, step)."""

    def __init__(self, tokens: Tokens, config: TrainingConfig, device: torch.device):
        self._tokens, self._config, self._device = tokens, config, device

    def slices(self, step: int) -> Iterator[tuple[Tensor, Tensor, RecurrentState | None]]:
        """The step's (inputs, targets, state) slices, int64 [batch_size / accumulation, block_length]."""
        config = self._config
        inputs, targets = random_blocks(self._tokens, config.block_length, config.batch_size, config.seed, step)
        for x, y in zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True):
            yield _moved(x, self._device), _moved(y, self._device), None

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        pass


class CarriedBlocks:
    """Truncated back-propagation through time (Williams and Peng 1990): each row reads its own part of the text in
    order, with the recurrent state carried from block to block, gradients cut between them."""

    def __init__(self, model: CausalLM, tokens: Tokens, config: TrainingConfig, device: torch.device):
        self._batches = ContiguousBatches(tokens, config.block_length, config.batch_size)
        self._config, self._device = config, device
        states = [model.make_state(config.batch_size // config.accumulation) for _ in range(config.accumulation)]
        if not all(isinstance(state, RecurrentState) for state in states):
            raise ValueError("carry_state: True, expected False: only recurrent models carry a state")
        self._states: list[RecurrentState] = states  # type: ignore[assignment]

    def slices(self, step: int) -> Iterator[tuple[Tensor, Tensor, RecurrentState | None]]:
        """As `RandomBlocks.slices`, with the state to read and to update."""
        config = self._config
        inputs, targets, starts_over = self._batches[step]
        if starts_over:
            for state in self._states:
                state.reset()
        chunks = zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), self._states, strict=True)
        for x, y, state in chunks:
            yield _moved(x, self._device), _moved(y, self._device), state

    def state_tensors(self) -> dict[str, Tensor]:
        """The carried states by name."""
        found = {}
        for index, state in enumerate(self._states):
            found[f"{index}/lengths"] = state.lengths
            for kind, tensors in (("h", state.h), ("c", state.c or [])):
                found.update({f"{index}/{kind}/{layer}": tensor for layer, tensor in enumerate(tensors)})
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Restores what `state_tensors` gave. Raises `ValueError` where names or shapes differ."""
        own = self.state_tensors()
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise ValueError(f"{source}: the carried state is not one of this model with this batch size")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
