"""Peak memory of one training step of GPT-2 124M, batch 8 of 512 tokens: ours against plain PyTorch.

Each side is a process of its own, since a peak of memory can't be taken back: `python -m bench.cases.training_memory
ours|torch`. Same architecture, same initial weights, AdamW, float32; the loss must agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import measure, models
from bench.case import Case, require
from bench.worker import OURS, EngineError

__all__ = ["cases"]

_BATCH, _TOKENS, _VOCABULARY = 8, 512, 50257
_ROOT = Path(__file__).resolve().parents[2]
_PEER = "torch"


def _measured(side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cases.training_memory", side, str(torch.get_num_threads())]
    done = subprocess.run(
        command, cwd=_ROOT, env=os.environ | {"PYTHONPATH": str(_ROOT)}, capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(side, f"exit code {done.returncode}: {last[:200]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cases() -> Iterator[Case]:
    """Forward, backward and one AdamW step, from transformers' GPT-2 weights."""
    results: dict[str, dict[str, Any]] = {}

    def gate() -> str:
        for side in (OURS, _PEER):
            results[side] = _measured(side)
        ours, peer = (results[side]["losses"] for side in (OURS, _PEER))
        # The second loss has seen the gradients of the first step.
        off = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
        require(off < 1e-3, f"losses {ours} differ from {peer}")
        return f"losses {ours[0]:.4f}, {ours[1]:.4f} agree within {off:.0e}"

    yield Case(
        name="peak memory of training, GPT-2 124M",
        shape=f"batch {_BATCH}, {_TOKENS} tokens",
        peer_name="transformers' GPT-2, cross_entropy, torch AdamW",
        gate=gate,
        ours=lambda: results[OURS]["peak_bytes"],
        peer=lambda: results[_PEER]["peak_bytes"],
        unit="bytes",
        goal=2.0,
        pairs=1,
        note="ours recomputes layers (`fastlm train --recompute`); each side in a fresh process, libraries included",
    )


def _run(side: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, _VOCABULARY, (_BATCH, _TOKENS + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model: Any
    if side == OURS:
        from fastlm import checkpoints

        model = checkpoints.load(models.gpt2_folder(), dtype=torch.float32).model.train()
        model.recompute = True
        # Dropout off on both sides, so that the losses can be compared.
        model.config = dataclasses.replace(model.config, dropout=0.0)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
    else:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(
            models.gpt2_folder(), dtype=torch.float32, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
        ).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        if side == OURS:
            loss = model.loss(inputs, targets)
        else:
            logits = model(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            del logits
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return {"losses": losses, "peak_bytes": measure.peak_rss()}


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
