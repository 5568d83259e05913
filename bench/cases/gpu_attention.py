"""Attention on a GPU, causal, bfloat16: forward, and forward with backward, against each backend of SDPA and
flash-attn. 16,384 tokens in batches of equal length and width 2,048, as flash-attention's authors measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case
from bench.gpu import live
from fastlm import ops

__all__ = ["cases"]

_Run = Callable[[Tensor, Tensor, Tensor], Tensor]
_WIDTH, _TOKENS = 2048, 16384


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.attention(query, key, value, causal=True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _backend(backend: SDPBackend) -> _Run:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(query, key, value)

    return run


def _flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)
    return out.transpose(1, 2)


_PEERS: dict[str, _Run] = {
    "SDPA flash": _backend(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _backend(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": _backend(SDPBackend.MATH),
    "flash-attn": _flash_attn,
}


def step(run: _Run, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with `backward` the three gradients for an output gradient of ones."""
    if not backward:
        with torch.no_grad():
            return [run(*inputs)]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """Heads of 64 and 128, 512 to 16,384 tokens; `small`: a shape for any machine."""
    tokens, width = (64, 128) if small else (_TOKENS, _WIDTH)
    for backward in (False, True):
        for dim in (64, 128):
            for length in (tokens,) if small else (512, 2048, 8192, _TOKENS):
                for name in _PEERS:
                    if name != "SDPA math" or length <= 2048:
                        yield _case(name, tokens // length, width // dim, length, dim, backward, device)


def _case(name: str, batch: int, heads: int, length: int, dim: int, backward: bool, device: str) -> Case:
    def make() -> list[Tensor]:
        return [
            live.rounded(batch, heads, length, dim, device=device, dtype=torch.bfloat16, grad=backward, seed=seed)
            for seed in range(3)
        ]

    held: list[Tensor] = []

    def inputs() -> list[Tensor]:
        held[:] = held or make()  # when its turn comes: the cases of a suite together would not fit
        return held

    def one(dtype: torch.dtype) -> list[Tensor]:
        # One head is enough: all are treated alike, and float64 scores of all would take gigabytes.
        return [t[:1, :1].detach().to(dtype).requires_grad_(backward) for t in inputs()]

    exact_of = _backend(SDPBackend.MATH)
    flops = (7.0 if backward else 2.0) * batch * heads * length * length * dim
    return Case(
        name=f"attention, causal, bf16, {'forward+backward' if backward else 'forward'}",
        shape=f"{batch} x {heads} heads of {dim}, {length:,} tokens",
        peer_name=name,
        gate=live.gate(
            lambda: step(_ours, one(torch.bfloat16), backward),
            lambda: step(_sdpa, one(torch.bfloat16), backward),
            lambda: step(exact_of, one(torch.float64), backward),
        ),
        ours=lambda: step(_ours, inputs(), backward),
        peer=live.peer(name, lambda: step(_PEERS[name], inputs(), backward)),
        moved=(8.0 if backward else 4.0) * batch * heads * length * dim * 2,
        flops=flops,
        device=device,
    )
