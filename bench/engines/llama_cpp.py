"""llama.cpp through the C interface of llama-cpp-python: the loop of its own `simple` and `batched` examples.

The package's high-level class copies and samples in Python; the few ctypes calls per token here cost microseconds.
pip builds it for the machine at hand; where that build crashes (seen on a virtual Xeon with AMX), name the instruction
sets: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON".
The record has what the build says of itself (`about`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as c
import numpy as np

from bench.engines import TEMPERATURE

__all__ = ["Engine"]

_CONTEXT = 1024  # positions per sequence: all any case needs
_BATCH = 512  # tokens per pass, the library's own default


class Engine:
    """A model and a context of up to `sequences` rows; every other parameter is the library's default."""

    def __init__(self, model: str, threads: int, sequences: int = 1) -> None:
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        if not self._model:
            raise ValueError(f"{model} can't be loaded")
        params = c.llama_context_default_params()
        params.n_ctx = _CONTEXT * sequences
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("no context")
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._batch = c.llama_batch_init(_BATCH, 0, 1)

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for at, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[at] = token
            batch.pos[at] = position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = wanted
        code = c.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def _clear(self) -> None:
        c.llama_memory_clear(c.llama_get_memory(self._context), False)

    def _sampler(self, top_p: float | None, seed: int) -> Any:
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if top_p is None:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
        else:
            # Temperature before top-p, as everybody else here does it.
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(TEMPERATURE))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(top_p, 1))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed))
        return chain

    def generate(self, prompts: list[list[int]], tokens: int, top_p: float | None = None) -> list[list[int]]:
        self._clear()
        samplers = [self._sampler(top_p, seed) for seed in range(len(prompts))]
        entries: list[tuple[int, int, int, bool]] = []
        new: list[list[int]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            if len(entries) + len(prompt) > _BATCH:
                raise ValueError(f"prompts hold more than {_BATCH} tokens")
            last = len(prompt) - 1
            entries += [(token, at, row, at == last) for at, token in enumerate(prompt)]
        places = [at for at, entry in enumerate(entries) if entry[3]]
        try:
            while True:
                self._run(entries)
                for row, (sampler, place) in enumerate(zip(samplers, places, strict=True)):
                    new[row].append(c.llama_sampler_sample(sampler, self._context, place))
                if len(new[0]) == tokens:
                    return new
                position = len(new[0]) - 1
                entries = [(new[row][-1], len(prompt) + position, row, True) for row, prompt in enumerate(prompts)]
                places = list(range(len(prompts)))
        finally:
            for sampler in samplers:
                c.llama_sampler_free(sampler)

    def about(self) -> str:
        return str(c.llama_print_system_info().decode().strip())

    def logits(self, ids: list[int]) -> Any:
        self._clear()
        self._run([(token, at, 0, True) for at, token in enumerate(ids)])
        values = c.llama_get_logits(self._context)
        flat = np.ctypeslib.as_array(
            ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), shape=(len(ids) * self._vocabulary,)
        )
        return flat.reshape(len(ids), self._vocabulary).copy()
