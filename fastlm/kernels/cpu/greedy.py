"""The largest output of a linear layer by the native kernel: csrc/include/fastlm/greedy.h."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native

__all__ = ["coarsen", "greedy"]


def coarsen(rows: Tensor, blocks: Tensor) -> None:
    """Rounds `rows`, contiguous float32 [n, K], to Q4_0, and leaves in them what is left.

    `blocks`: uint8 [n, K / 32 * 18], each row contiguous.
    """
    native.CPU.require().coarsen(
        rows.data_ptr(), blocks.data_ptr(), *rows.shape, blocks.stride(0), native.num_threads()
    )


def greedy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: int,
    screen: tuple[Tensor, Tensor, Tensor, Tensor],
    limits: tuple[float, float, float],
    counts: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """The lowest index of each row's largest output, the bounds that led to it, and the first row refused, or -1.

    Args:
        input: float32 [rows, K], contiguous.
        weight: its bytes, interleaved if it is of a Q kind; `kind`: the number of it.
        bias: float32 [N], contiguous, or None.
        screen: the coarse copy, slack, basis and inverses; `limits`: off, floor, most.
        counts: int64 [2], added to: rows of the weight computed exactly, and calls.

    Returns:
        int64 [rows], float32 [rows, N], and an int.
    """
    coarse, slack, basis, inverses = screen
    rows, columns = input.shape
    outputs = len(slack)
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    bounds = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
    refused: int = native.CPU.require().greedy(
        input.data_ptr(), weight.data_ptr(), native.address(bias), kind, coarse.data_ptr(), slack.data_ptr(),
        basis.data_ptr(), inverses.data_ptr(), *limits, rows, columns, outputs, tokens.data_ptr(), counts.data_ptr(),
        bounds.data_ptr(), native.num_threads(),
    )  # fmt: skip
    return tokens, bounds, refused
