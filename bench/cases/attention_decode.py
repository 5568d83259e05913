"""One new token per row over a long KV cache, grouped-query heads, against PyTorch's fused operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, require
from fastlm import ops
from fastlm.reference.kv_cache import kv_read, kv_width

__all__ = ["cases"]

_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64  # SmolLM2-135M's
_NOTES = {
    torch.float32: "",
    torch.bfloat16: "keys and values in bfloat16, the query in float32; the peer's all in float32",
    torch.int8: "keys and values in 8 bits; the peer's in float32, since PyTorch has no such cache",
}


def cases() -> Iterator[Case]:
    """Context 128 to 8,192, batch 1 and 16; every row as long as the cache, so that the peer needs no mask."""
    for dtype in _NOTES:
        for batch in (1, 16):
            for context in (128, 512, 2048, 8192):
                yield _case(dtype, batch, context)


def _case(dtype: torch.dtype, batch: int, context: int) -> Case:
    torch.manual_seed(0)
    query = torch.randn(batch, _HEADS, 1, _HEAD_DIM)
    keys, values = (torch.randn(batch, _KV_HEADS, context, _HEAD_DIM) for _ in range(2))
    width = kv_width(_HEAD_DIM, dtype)
    key_cache, value_cache = (torch.empty(batch, _KV_HEADS, context, width, dtype=dtype) for _ in range(2))
    ops.kv_append(key_cache, value_cache, keys, values, torch.zeros(batch, dtype=torch.int64))
    lengths = torch.full((batch,), context)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return ops.attention_decode(query, key_cache, value_cache, lengths)

    def peer(dtype: torch.dtype = torch.float32, held: bool = False) -> torch.Tensor:
        kv = [kv_read(c, torch.float32) for c in (key_cache, value_cache)] if held else [keys, values]
        q, k, v = (tensor.to(dtype) for tensor in (query, *kv))
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def gate() -> str:
        # Of what the cache holds, to rounding; and of what was put into it, to what its numbers can tell apart.
        want = peer(torch.float64, held=True)
        bound = 2 * float((peer(held=True) - want).abs().max()) + 1e-6 * float(want.abs().max())
        error = float((ours() - want).abs().max())
        require(error <= bound, f"output is off by {error:.1e}, allowed {bound:.1e}")
        exact = peer(torch.float64)
        lost = float((want - exact).norm() / exact.norm())
        require(lost < 0.02, f"the cache's rounding changes the output by {lost:.1%}")
        return "within twice PyTorch's own error" + (f", rounding {lost:.1%}" if lost else "")

    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"attention, one token, {name} cache",
        shape=f"batch {batch}, context {context:,}, {_HEADS} heads over {_KV_HEADS}, {_HEAD_DIM} wide",
        peer_name="torch SDPA, enable_gqa",
        gate=gate,
        ours=ours,
        peer=peer,
        goal=3.0,
        seconds=0.15,
        moved=key_cache.nbytes + value_cache.nbytes,
        flops=4.0 * batch * _HEADS * context * _HEAD_DIM,
        note=_NOTES[dtype],
    )
