"""Mixed precision: which one pays on this hardware, and autocast with loss scaling where it is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fastlm.training.config import Precision

# Measured with AMX, training a GPT on one thread: bfloat16 over float32 is 1.45x at width 128, and more beyond. Far
# below, casting the weights at each step costs what the products save.
_CPU_WIDTH = 128


def choose(requested: Precision, device: torch.device, *, width: int | None) -> Precision:
    """The precision to run in: `requested`, or for "auto" the fastest that trains like float32.

    auto is bfloat16 on CUDA with native bfloat16, float16 with loss scaling on older CUDA, bfloat16 on a CPU with AMX
    or AVX512-BF16 (elsewhere PyTorch's bfloat16 matmul is hundreds of times slower than float32) for wide enough
    models, and float32 otherwise.

    Args:
        requested: what the user asks for.
        device: where the model is.
        width: the model's hidden size; None for recurrent models, whose native CPU kernels compute in float32.

    Raises `ValueError` for a requested one that the device cannot run.
    """
    if requested == "auto":
        if device.type == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        wide = width is not None and width >= _CPU_WIDTH
        return "bfloat16" if device.type == "cpu" and wide and cpu_has_fast_bfloat16() else "float32"
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
