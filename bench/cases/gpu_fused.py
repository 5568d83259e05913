"""Fused kernels of training on a GPU against PyTorch and Liger: norm, SwiGLU, and the head with its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case
from bench.gpu import live
from fastlm import ops

__all__ = ["cases"]

_Run = Callable[..., Tensor]


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


_OPS: dict[str, tuple[_Run, _Run, _Run]] = {
    "rms_norm": (
        lambda x, w: ops.rms_norm(x, w, eps=1e-5),
        lambda x, w: functional.rms_norm(x, w.shape, w, 1e-5),
        _liger_norm,
    ),
    "swiglu": (ops.swiglu, lambda gate, up: functional.silu(gate) * up, _liger_swiglu),
    "head and loss": (ops.cross_entropy, _plain_loss, _liger_loss),
}


def cases(device: str = "cuda", small: bool = False) -> Iterator[Case]:
    """bfloat16, forward and backward, 8,192 tokens of width 4,096; the loss over 32,000 tokens of vocabulary."""
    tokens, width, vocabulary = (12, 32, 50) if small else (8192, 4096, 32000)
    shapes = {
        "rms_norm": ((tokens, width), (width,)),
        "swiglu": ((tokens, width), (tokens, width)),
        "head and loss": ((tokens, width), (vocabulary, width)),
    }
    for name, (ours, plain, liger) in _OPS.items():
        for peer, run in (("torch", plain), ("Liger", liger)):
            yield _case(name, ours, plain, peer, run, shapes[name], device)


def _case(
    name: str, ours: _Run, plain: _Run, peer: str, theirs: _Run, shapes: tuple[tuple[int, ...], ...], device: str
) -> Case:
    def make(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        scale = shapes[1][-1] ** -0.5 if name == "head and loss" else 1.0
        wanted = [
            live.rounded(*shape, device=device, dtype=torch.bfloat16, seed=seed, times=scale if seed else 1.0)
            .to(dtype)
            .requires_grad_()
            for seed, shape in enumerate(shapes)
        ]
        rest = []
        if name == "head and loss":
            generator = torch.Generator(device).manual_seed(2)
            rest = [torch.randint(shapes[1][0], (shapes[0][0],), device=device, generator=generator)]
        return wanted, rest

    held: list[tuple[list[Tensor], list[Tensor]]] = []

    def step(run: _Run, dtype: torch.dtype | None = None) -> list[Tensor]:
        if dtype is None:
            held[:] = held or [make(torch.bfloat16)]
        wanted, rest = held[0] if dtype is None else make(dtype)
        out = run(*wanted, *rest)
        return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes]
    loss = name == "head and loss"
    return Case(
        name=f"{name}, bf16, forward+backward",
        shape=" and ".join(str(list(shape)) for shape in shapes),
        peer_name=peer,
        gate=live.gate(lambda: step(ours), lambda: step(plain), lambda: step(plain, torch.float64)),
        ours=lambda: step(ours),
        peer=live.peer(peer, lambda: step(theirs)),
        moved=2.0 * 2 * (2 * sizes[0] + 2 * sizes[1]),
        flops=6.0 * shapes[0][0] * shapes[1][0] * shapes[0][1] if loss else None,
        device=device,
    )
