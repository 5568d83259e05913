"""Attention over a whole sequence, causal: forward, and forward with backward, against PyTorch's fused operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, require
from fastlm import ops

__all__ = ["cases"]

_WIDTH = 768
_LENGTHS = (256, 512, 1024, 2048, 4096)
_Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.attention(query, key, value, causal=True)


def _peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _step(run: _Run, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with `backward` the three gradients for an output gradient of ones."""
    if not backward:
        with torch.no_grad():
            return [run(*inputs)]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


def cases() -> Iterator[Case]:
    """Batch 1, width 768 in heads of 64 and of 128, 256 to 4,096 tokens."""
    for backward in (False, True):
        for head_dim in (64, 128):
            for length in _LENGTHS:
                yield _case(length, head_dim, backward)


def _case(length: int, head_dim: int, backward: bool) -> Case:
    heads = _WIDTH // head_dim
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, length, head_dim, requires_grad=backward) for _ in range(3)]

    def gate() -> str:
        # One head is enough: all are treated alike, and float64 scores of all would take gigabytes.
        one = [tensor[:, :1].detach().requires_grad_(backward) for tensor in inputs]
        exact = _step(_peer, [tensor.detach().double().requires_grad_(backward) for tensor in one], backward)
        got, reference = _step(_ours, one, backward), _step(_peer, one, backward)
        for name, g, r, w in zip(("output", "dQ", "dK", "dV"), got, reference, exact, strict=False):
            bound = 2 * float((r - w).abs().max()) + 1e-6 * float(w.abs().max())
            error = float((g - w).abs().max())
            require(error <= bound, f"{name} is off by {error:.1e}, allowed {bound:.1e}")
        return "within twice PyTorch's own error"

    # Query-key and value products over the lower triangle; backward recomputes one and has four more.
    flops = (7.0 if backward else 2.0) * heads * length * length * head_dim
    return Case(
        name=f"attention, causal, {'forward+backward' if backward else 'forward'}",
        shape=f"{heads} heads of {head_dim}, {length:,} tokens",
        peer_name="torch SDPA",
        gate=gate,
        ours=lambda: _step(_ours, inputs, backward),
        peer=lambda: _step(_peer, inputs, backward),
        goal=1.3,
        pairs=5,
        moved=(8.0 if backward else 4.0) * inputs[0].nbytes,
        flops=flops,
    )
