"""Decoding against transformers under torch.compile with its static cache, which takes minutes to compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench import models
from bench.case import Case
from bench.gates import smollm2_gate, text
from bench.generating import matrices, task
from bench.worker import OURS, Pool

__all__ = ["cases"]

_TOKENS = 128


def cases() -> Iterator[Case]:
    """SmolLM2-135M in float32, batch 1, greedy."""
    file = models.smollm2("F32")
    prompt, size = [text()[:16]], matrices(file)
    with Pool(torch.get_num_threads()) as pool:
        ours = task(pool, OURS, file, prompt, _TOKENS)
        yield Case(
            name="decode SmolLM2-135M F32",
            shape=f"batch 1, {_TOKENS} tokens",
            peer_name="transformers float32, torch.compile",
            gate=partial(smollm2_gate, "F32"),
            ours=ours,
            settle=ours.settle,
            peer=task(pool, "transformers", file, prompt, _TOKENS, compiled=True),
            work=_TOKENS,
            unit="tokens",
            pairs=5,
            moved=size.nbytes * _TOKENS,
            resident=size.nbytes,
            flops=2 * size.elements * _TOKENS,
            note=models.how_made("F32"),
        )
