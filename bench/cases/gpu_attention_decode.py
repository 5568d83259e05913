"""One new token over a bfloat16 KV cache on a GPU, grouped queries, against SDPA, flash-attn and FlashInfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case
from bench.gpu import live
from fastlm import ops

__all__ = ["cases"]

_HEADS, _KV_HEADS, _DIM = 32, 8, 128
_Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _ours(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return ops.attention_decode(query, keys, values, lengths)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _flash_attn(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    heads_last = (t.transpose(1, 2) for t in (query, keys, values))
    out: Tensor = flash_attn_with_kvcache(*heads_last, cache_seqlens=lengths.int(), causal=True)
    return out.transpose(1, 2)


def _flashinfer(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    from flashinfer import single_decode_with_kv_cache

    if len(query) != 1:
        raise NotImplementedError("asked for one sequence only: its batch needs a plan and pages")
    out: Tensor = single_decode_with_kv_cache(query[0, :, 0], keys[0], values[0], kv_layout="HND")
    return out[None, :, None]


_PEERS: dict[str, _Run] = {"SDPA": _sdpa, "flash-attn": _flash_attn, "FlashInfer": _flashinfer}


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """Batch 1 and 16, contexts of 1,024 to 32,768 tokens."""
    for batch in (1, 16):
        for context in (40,) if small else (1024, 8192, 32768):
            for name in _PEERS:
                if batch == 1 or name != "FlashInfer":
                    yield _case(name, batch, context, device)


def _case(name: str, batch: int, context: int, device: str) -> Case:
    def make(dtype: torch.dtype = torch.bfloat16, batch: int = batch) -> list[Tensor]:
        sizes = ((_HEADS, 1), (_KV_HEADS, context), (_KV_HEADS, context))
        found = [
            live.rounded(batch, heads, length, _DIM, device=device, dtype=torch.bfloat16, seed=seed).to(dtype)
            for seed, (heads, length) in enumerate(sizes)
        ]
        return [*found, torch.full((batch,), context, device=device)]

    held: list[Tensor] = []

    def inputs() -> list[Tensor]:
        held[:] = held or make()
        return held

    cache = 2.0 * batch * _KV_HEADS * context * _DIM * 2
    return Case(
        name="attention, decode, bf16",
        shape=f"batch {batch}, {_HEADS}/{_KV_HEADS} heads of {_DIM}, context {context:,}",
        peer_name=name,
        gate=live.gate(
            lambda: _ours(*make(batch=1)),
            lambda: _sdpa(*make(batch=1)),
            lambda: _sdpa(*make(torch.float64, batch=1)),
        ),
        ours=lambda: _ours(*inputs()),
        peer=live.peer(name, lambda: _PEERS[name](*inputs())),
        moved=cache,
        flops=4.0 * batch * _HEADS * context * _DIM,
        device=device,
    )
