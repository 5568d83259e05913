"""The bound by which a fast implementation is judged: twice the error torch makes in the same dtype, plus a floor."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_reference(
    fast: Tensor, torch_same_dtype: Tensor, ref64: Tensor, *, floor: float = 1e-6, factor: float = 2.0
) -> None:
    """Asserts max|fast - ref64| <= factor * max|torch - ref64| + floor * max|ref64|.

    `ref64` is the float64 reference. The floor is relative to the result's own magnitude, so that no tolerance lets
    an all-zero output pass; a non-finite value where the reference is finite fails.
    """
    assert fast.shape == ref64.shape, f"shape {list(fast.shape)}, expected {list(ref64.shape)}"
    assert ref64.dtype == torch.float64
    if ref64.numel() == 0:
        return
    error = (fast.double() - ref64).abs()
    assert bool(torch.isfinite(error).all()), "non-finite values"
    allowed = factor * (torch_same_dtype.double() - ref64).abs().max() + floor * ref64.abs().max()
    assert error.max() <= allowed, f"error {error.max():.3e} exceeds {allowed:.3e}"
