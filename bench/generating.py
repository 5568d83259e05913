"""What the groups that generate with whole models share: an engine's turn as a Task, and what one token must read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.worker import Pool, Task

__all__ = ["PEERS", "Matrices", "matrices", "task"]

PEERS = {
    "llama_cpp": "llama.cpp {kind}",
    "ctranslate2": "CTranslate2 {kind}",
    "transformers": "transformers float32",
}


def task(
    pool: Pool, engine: str, model: Path | Callable[[], Path], prompts: list[list[int]], tokens: int, **how: Any
) -> Task:
    """`tokens` new tokens for each prompt; `top_p` among `how` is for drawing, the rest are options of the engine."""
    top_p = how.pop("top_p", None)
    return Task(pool, engine, model, "generate", (prompts, tokens, top_p), how)


@dataclass(frozen=True)
class Matrices:
    """What each token multiplies with: the tied embedding is the head, positions are looked up."""

    nbytes: int
    elements: int
    head_elements: int


@functools.cache
def matrices(file: Path) -> Matrices:
    """Of a GGUF file with a tied embedding."""
    from fastlm.checkpoints.gguf import GGUFFile

    sizes = {
        name: (tensor.nbytes, math.prod(tensor.shape))
        for name, tensor in GGUFFile(file).tensors.items()
        if len(tensor.shape) == 2 and not name.startswith("position_embd")
    }
    return Matrices(
        sum(nbytes for nbytes, _ in sizes.values()),
        sum(elements for _, elements in sizes.values()),
        sizes["token_embd.weight"][1],
    )
