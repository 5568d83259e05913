"""One new token per row over a long KV cache, grouped-query heads, against PyTorch's fused operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, require
from fastlm import ops

__all__ = ["cases"]

_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64  # SmolLM2-135M's


def cases() -> Iterator[Case]:
    """Context 128 to 8,192, batch 1 and 16; every row as long as the cache, so that the peer needs no mask."""
    for batch in (1, 16):
        for context in (128, 512, 2048, 8192):
            yield _case(batch, context)


def _case(batch: int, context: int) -> Case:
    torch.manual_seed(0)
    query = torch.randn(batch, _HEADS, 1, _HEAD_DIM)
    keys, values = (torch.randn(batch, _KV_HEADS, context, _HEAD_DIM) for _ in range(2))
    lengths = torch.full((batch,), context)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return ops.attention_decode(query, keys, values, lengths)

    def peer(double: bool = False) -> torch.Tensor:
        q, k, v = (tensor.double() if double else tensor for tensor in (query, keys, values))
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def gate() -> str:
        want = peer(double=True)
        bound = 2 * float((peer() - want).abs().max()) + 1e-6 * float(want.abs().max())
        error = float((ours() - want).abs().max())
        require(error <= bound, f"output is off by {error:.1e}, allowed {bound:.1e}")
        return "within twice PyTorch's own error"

    return Case(
        name="attention, one token",
        shape=f"batch {batch}, context {context:,}, {_HEADS} heads over {_KV_HEADS}, {_HEAD_DIM} wide",
        peer_name="torch SDPA, enable_gqa",
        gate=gate,
        ours=ours,
        peer=peer,
        goal=3.0,
        moved=keys.nbytes + values.nbytes,
        flops=4.0 * batch * _HEADS * context * _HEAD_DIM,
    )
