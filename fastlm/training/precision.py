"""Mixed precision: which one pays on this hardware, and autocast with loss scaling where it is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fastlm.training.config import Precision


def choose(requested: Precision, device: torch.device, *, recurrent: bool = False) -> Precision:
    """The precision to run in: `requested`, or for "auto" the fastest that trains like float32.

    auto is bfloat16 on CUDA with native bfloat16, float16 with loss scaling on older CUDA, bfloat16 on a CPU with AMX
    or AVX512-BF16 (elsewhere PyTorch's bfloat16 matmul is hundreds of times slower than float32) and float32 otherwise.
    Recurrent models on the CPU stay in float32, as their native kernels do.

    Raises `ValueError` for a requested one that the device cannot run.
    """
    if requested == "auto":
        if device.type == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return "bfloat16" if device.type == "cpu" and not recurrent and cpu_has_fast_bfloat16() else "float32"
    if requested == "float16" and device.type != "cuda":
        raise ValueError(f"precision: 'float16' on {device.type}, expected 'float32' or 'bfloat16': float16 needs CUDA")
    return requested


def cpu_has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX tiles or AVX512-BF16)."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context to run the forward pass in."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float16)
