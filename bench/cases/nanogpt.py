"""nanoGPT's CPU recipe on tiny-shakespeare: the same model, data and iterations, wall time, equal loss.

https://github.com/karpathy/nanoGPT (README, "i only have a macbook"): characters, 4 layers, 4 heads, width 128, block
64, batch 12, 2,000 iterations, no dropout, no biases. The peer is that model and loop in plain PyTorch. The text is the
file named by $FASTLM_BENCH_TEXT (tiny-shakespeare's input.txt); without it, Python's language reference, and the row
says so. Needs minutes: `python -m bench cpu --long`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.case import Case, GateFailed, require

__all__ = ["cases"]

_LAYERS, _HEADS, _WIDTH, _BLOCK, _BATCH = 4, 4, 128, 64, 12
_ITERATIONS = 2000
_LOSS_BATCHES = 20
_RATE, _WARMUP, _DECAY, _CLIP, _BETAS = 1e-3, 100, 0.1, 1.0, (0.9, 0.99)


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


def _run_peer(train: Tensor, valid: Tensor, vocabulary: int) -> tuple[float, float]:
    torch.manual_seed(1337)
    model = _NanoGPT(vocabulary)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS)
    generator = torch.Generator().manual_seed(1337)
    start = time.perf_counter()
    for step in range(_ITERATIONS):
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step)
        loss = model(*_batch(train, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return time.perf_counter() - start, _validation_loss(model, valid)


def _run_ours(train: Tensor, valid: Tensor, vocabulary: int) -> tuple[float, float]:
    from fastlm.models import build
    from fastlm.training import Trainer, TrainingConfig

    torch.manual_seed(1337)
    sizes = {"num_layers": _LAYERS, "num_heads": _HEADS, "hidden_size": _WIDTH, "context_length": _BLOCK}
    model = build({"architecture": "gpt", "vocab_size": vocabulary, "bias": False, **sizes})
    config = TrainingConfig(
        learning_rate=_RATE,
        warmup_steps=_WARMUP,
        betas=_BETAS,
        weight_decay=_DECAY,
        clip_norm=_CLIP,
        batch_size=_BATCH,
        block_length=_BLOCK,
        max_steps=_ITERATIONS,
        eval_interval=_ITERATIONS,
        precision="float32",
        seed=1337,
    )
    trainer = Trainer(model, train, None, config)
    start = time.perf_counter()
    trainer.train()
    taken = time.perf_counter() - start
    return taken, _validation_loss(model.eval().loss, valid)


def cases() -> Iterator[Case]:
    """One run of each side, for the gate, whose times are the figures."""
    text, name = _text()
    characters = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[character] for character in text])
    cut = len(ids) * 9 // 10
    data = (ids[:cut], ids[cut:], len(characters))
    times: dict[str, float] = {}

    def gate() -> str:
        times["ours"], loss = _run_ours(*data)
        times["peer"], wanted = _run_peer(*data)
        if not math.isfinite(wanted):
            raise GateFailed(f"the peer's loss is {wanted}")
        require(loss <= wanted + 0.02, f"validation loss {loss:.3f}, the peer's is {wanted:.3f}")
        return f"validation loss {loss:.3f}, the peer's {wanted:.3f}"

    yield Case(
        name="train nanoGPT's CPU recipe",
        shape=f"{_LAYERS} layers, width {_WIDTH}, block {_BLOCK}, batch {_BATCH}, {_ITERATIONS:,} iterations",
        peer_name="the same in plain PyTorch",
        gate=gate,
        ours=lambda: times["ours"],
        peer=lambda: times["peer"],
        unit="seconds",
        goal=1.5,
        pairs=1,
        note=f"characters of {name}",
    )
