"""nanoGPT's CPU recipe on tiny-shakespeare: the same model, data and iterations, wall time, equal loss; and the time in
which our own recipe reaches that loss.

https://github.com/karpathy/nanoGPT (README, "i only have a macbook"): characters, 4 layers, 4 heads, width 128, block
64, batch 12, 2,000 iterations, no dropout, no biases. The peer is that model and loop in plain PyTorch. The text is the
file named by $FASTLM_BENCH_TEXT (tiny-shakespeare's input.txt); without it, Python's language reference, and the row
says so. Needs minutes: `python -m bench cpu --long`.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.case import Case, GateFailed, require
from fastlm.models import build
from fastlm.training import Callback, StepRecord, Trainer, TrainingConfig
from fastlm.training.precision import choose
from fastlm.training.presets import model_config, training_defaults

__all__ = ["cases"]

_LAYERS, _HEADS, _WIDTH, _BLOCK, _BATCH = 4, 4, 128, 64, 12
_ITERATIONS = 2000
_RECIPE_STEPS = 350
_LOSS_BATCHES = 20
_RATE, _WARMUP, _DECAY, _CLIP, _BETAS = 1e-3, 100, 0.1, 1.0, (0.9, 0.99)

Data: TypeAlias = tuple[Tensor, Tensor, int]  # training and validation text, and the vocabulary's size


def _text() -> tuple[str, str]:
    path = os.environ.get("FASTLM_BENCH_TEXT")
    if path:
        return Path(path).read_text(encoding="utf-8"), Path(path).name
    from fastlm.data.corpora import corpus

    return "\n".join(corpus("topics")), "Python's language reference"


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = (nn.LayerNorm(_WIDTH, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False), nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH, bias=False), nn.Linear(4 * _WIDTH, _WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, _HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).split(_WIDTH, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, _WIDTH))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class _NanoGPT(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, _WIDTH), nn.Embedding(_BLOCK, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * _LAYERS) if residual else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _batch(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - _BLOCK, (_BATCH,), generator=generator).tolist()
    blocks = torch.stack([ids[start : start + _BLOCK + 1] for start in starts])
    return blocks[:, :-1], blocks[:, 1:]


def _learning_rate(step: int) -> float:
    if step < _WARMUP:
        return _RATE * (step + 1) / (_WARMUP + 1)
    done = (step - _WARMUP) / (_ITERATIONS - _WARMUP)
    return _RATE / 10 * (1 + 4.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def _validation_loss(loss: Callable[[Tensor, Tensor], Tensor], ids: Tensor) -> float:
    generator = torch.Generator().manual_seed(7)
    return sum(float(loss(*_batch(ids, generator))) for _ in range(_LOSS_BATCHES)) / _LOSS_BATCHES


class _Peer:
    """nanoGPT's model and loop, an iteration at a time."""

    def __init__(self, data: Data) -> None:
        torch.manual_seed(1337)
        self.train, self.valid, vocabulary = data
        self.model = _NanoGPT(vocabulary)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS)
        self.generator = torch.Generator().manual_seed(1337)
        self.steps, self.seconds = 0, 0.0

    def run(self, iterations: int) -> None:
        start = time.perf_counter()
        for step in range(self.steps, self.steps + iterations):
            for group in self.optimiser.param_groups:
                group["lr"] = _learning_rate(step)
            self.model(*_batch(self.train, self.generator)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        self.steps += iterations
        self.seconds += time.perf_counter() - start

    def loss(self) -> float:
        return _validation_loss(self.model, self.valid)


class _InTurn(Callback):
    """Runs as many of the peer's iterations as ours has just done: a few of each at a time, so that a machine whose
    speed changes does so for both."""

    def __init__(self, peer: _Peer) -> None:
        self.peer = peer

    def on_steps(self, trainer: Trainer, records: Sequence[StepRecord]) -> None:
        self.peer.run(len(records))


def _run(model: dict[str, Any], training: dict[str, Any], data: Data, peer: _Peer) -> tuple[float, float]:
    """Our seconds, the peer's turns not counted, and the validation loss."""
    train, valid, vocabulary = data
    torch.manual_seed(1337)
    network = build({**model, "vocab_size": vocabulary})
    steps = training["max_steps"]
    config = TrainingConfig(**training, block_length=_BLOCK, eval_interval=steps, seed=1337)
    before, start = peer.seconds, time.perf_counter()
    Trainer(network, train, None, config, None, [_InTurn(peer)]).train()
    taken = time.perf_counter() - start - (peer.seconds - before)
    return taken, _validation_loss(network.eval().loss, valid)


def cases() -> Iterator[Case]:
    """A run of each side, for the gate, whose times are the figures; then our own recipe."""
    text, name = _text()
    characters = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[character] for character in text])
    cut = len(ids) * 9 // 10
    data = (ids[:cut], ids[cut:], len(characters))
    sizes = {"num_layers": _LAYERS, "num_heads": _HEADS, "hidden_size": _WIDTH, "context_length": _BLOCK}
    same = {
        "learning_rate": _RATE,
        "warmup_steps": _WARMUP,
        "betas": _BETAS,
        "weight_decay": _DECAY,
        "clip_norm": _CLIP,
        "batch_size": _BATCH,
        "max_steps": _ITERATIONS,
    }
    results: dict[str, tuple[float, float]] = {}

    def gate(key: str, model: dict[str, Any], training: dict[str, Any], slack: float) -> str:
        peer = _Peer(data)
        taken, loss = _run(model, training, data, peer)
        if key == "recipe" and "same" in results:
            wanted = results["wanted"][0]
        else:
            peer.run(_ITERATIONS - peer.steps)
            wanted = peer.loss()
        if not math.isfinite(wanted):
            raise GateFailed(f"the peer's loss is {wanted}")
        results["wanted"] = (wanted, wanted)
        results[key] = (taken, peer.seconds * _ITERATIONS / peer.steps)
        require(loss <= wanted + slack, f"validation loss {loss:.3f}, the peer's is {wanted:.3f}")
        return f"validation loss {loss:.3f}, the peer's {wanted:.3f}"

    precision = choose("auto", torch.device("cpu"), width=_WIDTH)
    for key, title, model, training, slack, goal, note in (
        (
            "same",
            "train nanoGPT's CPU recipe",
            {"architecture": "gpt", "bias": False, **sizes},
            {**same, "precision": precision},
            0.02,
            1.5,
            f"same model (ours with GELU by tanh), data, iterations; the peer in float32, ours in {precision}",
        ),
        (
            "recipe",
            "reach nanoGPT's loss by our recipe",
            model_config("modern", "tiny", len(characters), context=_BLOCK),
            {**_recipe(len(characters)), "max_steps": _RECIPE_STEPS, "precision": precision},
            0.0,
            3.0,
            f"`--model modern`, {_RECIPE_STEPS} steps against {_ITERATIONS:,}, {precision}",
        ),
    ):
        yield Case(
            name=title,
            shape=f"{_LAYERS} layers, width {_WIDTH}, block {_BLOCK}, batch {training['batch_size']}",
            peer_name="nanoGPT in plain PyTorch",
            gate=functools.partial(gate, key, model, training, slack),
            ours=functools.partial(lambda key: results[key][0], key),
            peer=functools.partial(lambda key: results[key][1], key),
            unit="seconds",
            goal=goal,
            pairs=1,
            note=f"characters of {name}; {note}",
        )


def _recipe(vocabulary: int) -> dict[str, Any]:
    defaults = training_defaults(model_config("modern", "tiny", vocabulary, context=_BLOCK), "tiny")
    return {key: value for key, value in defaults.items() if key != "block_length"}
