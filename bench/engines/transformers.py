"""Hugging Face transformers in float32, from a GGUF file (which it expands) or from a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bench.engines import TEMPERATURE, settle

__all__ = ["Engine"]


class Engine:
    """`AutoModelForCausalLM` with its default attention (PyTorch's fused one): eager with the growing KV cache, or
    `compiled` with the static one, which is what torch.compile needs. With `door`, `generate` gets the one added
    argument that hands it to fastlm: "float32", or the kind of weights fastlm converts the model's to."""

    def __init__(self, model: str, threads: int, compiled: bool = False, door: str | None = None) -> None:
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        path = Path(model)
        where: dict[str, Any] = {"pretrained_model_name_or_path": model}
        if path.is_file():
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self._model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        self._added: dict[str, Any] = {}
        if compiled:
            self._model.forward = torch.compile(self._model.forward)
            self._added = {"cache_implementation": "static"}
        if door is not None:
            import fastlm

            # fastlm says by a warning that it leaves the work to transformers, which would be no figure of ours.
            warnings.filterwarnings("error", message="fastlm.generate leaves this")
            weights = {} if door == "float32" else {"weights": door}
            self._added = {"custom_generate": fastlm.generate} | weights

    def generate(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> list[list[int]]:
        ids = torch.tensor(prompts)
        how: dict[str, Any] = {"do_sample": False} | self._added
        if top_p is not None:
            how |= {"do_sample": True, "temperature": TEMPERATURE, "top_p": top_p, "top_k": 0}
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                **how,
            )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    def settle(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> tuple[int, str]:
        return settle(lambda: self.generate(prompts, tokens, top_p))

    def about(self) -> str:
        added = ", ".join(self._added) or "eager"
        return f"{self._model.dtype}, attention {self._model.config._attn_implementation}, {added}"

    def logits(self, ids: list[int]) -> Any:
        with torch.inference_mode():
            return self._model(torch.tensor([ids])).logits[0].numpy()
