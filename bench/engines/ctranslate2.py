"""CTranslate2, from a converted folder whose tokens are named "t0", "t1", ... (`bench.models`)."""

from __future__ import annotations

from typing import Any

import ctranslate2
import numpy as np

from bench.engines import TEMPERATURE

__all__ = ["Engine"]


class Engine:
    """`ctranslate2.Generator`; the option `compute_type` is its argument."""

    def __init__(self, model: str, threads: int, compute_type: str = "float32") -> None:
        self._generator = ctranslate2.Generator(
            model, inter_threads=1, intra_threads=threads, compute_type=compute_type
        )

    def generate(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> list[list[int]]:
        how: dict[str, Any] = {"sampling_topk": 1}
        if top_p is not None:
            how = {"sampling_topk": 0, "sampling_topp": top_p, "sampling_temperature": TEMPERATURE}
        results = self._generator.generate_batch(
            [[f"t{index}" for index in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            include_prompt_in_result=False,
            **how,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def about(self) -> str:
        return f"compute type {self._generator.compute_type}"

    def logits(self, ids: list[int]) -> Any:
        return np.array(self._generator.forward_batch([ids]))[0]
