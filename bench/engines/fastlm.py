"""Ours."""

from __future__ import annotations

from typing import Any

import torch

import fastlm
from bench.engines import TEMPERATURE, settle

__all__ = ["Engine"]


class Engine:
    """`fastlm.load`; the option `compute` is its argument."""

    def __init__(self, model: str, threads: int, compute: str = "fast") -> None:
        torch.set_num_threads(threads)
        self._compute = compute
        self._model = fastlm.load(model, compute=compute)

    def generate(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> list[list[int]]:
        how: Any = {"temperature": 0} if top_p is None else {"temperature": TEMPERATURE, "top_p": top_p, "seed": 1}
        return self._model.generate_ids(prompts, max_new_tokens=tokens, min_new_tokens=tokens, **how)

    def settle(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> tuple[int, str]:
        return settle(lambda: self.generate(prompts, tokens, top_p))

    def about(self) -> str:
        return f"compute {self._compute}"

    def logits(self, ids: list[int]) -> Any:
        return self._model.logits([ids])[0].numpy()
