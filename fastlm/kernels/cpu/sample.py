"""`sample` by the native kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.reference import sample as reference
from fastlm.reference.sample import Option

__all__ = ["Call", "arguments", "run", "why_not"]


def why_not(logits: Tensor, *_: object) -> str | None:
    if native.CPU.module is None:
        return native.CPU.error
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    return None


def _split(
    options: Sequence[Option], dtype: torch.dtype, device: torch.device, keep_alive: list[Tensor]
) -> tuple[list[float], list[int]]:
    """Options as numbers, and as addresses of [B] tensors (0: it is a number), which `keep_alive` holds."""
    values: list[float] = []
    addresses = [0] * len(options)
    for index, option in enumerate(options):
        if isinstance(option, Tensor):
            rows = option.to(device, dtype).contiguous()
            keep_alive.append(rows)
            addresses[index] = rows.data_ptr()
            option = 0
        values.append(option)
    return values, addresses


def arguments(
    x: Tensor,
    options: Sequence[Option],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Option | None,
    prompt_lengths: Option | None,
    tokens: Tensor,
    keep_alive: list[Tensor],
) -> tuple[Any, ...]:
    """What the bindings of CPU and CUDA take first: addresses on the device of x [B, V], contiguous along V.

    `keep_alive` gets what the addresses are of, beside x and tokens [B], and has to outlive the call.
    """
    bias_address = bias_stride = history_address = history_stride = length = 0
    if logit_bias is not None:
        bias = logit_bias.to(x.device, torch.float32)
        bias = bias if bias.stride(1) == 1 else bias.contiguous()
        keep_alive.append(bias)
        bias_address, bias_stride = bias.data_ptr(), bias.stride(0)
    if history is not None and history.shape[1] > 0:
        ids = history.to(x.device)
        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        keep_alive.append(ids)
        history_address, history_stride, length = ids.data_ptr(), ids.stride(0), ids.shape[1]
    lengths = (
        length if history_lengths is None else history_lengths,
        0 if prompt_lengths is None else prompt_lengths,
    )
    reals, real_rows = _split(options[:6], torch.float64, x.device, keep_alive)
    integers, integer_rows = _split((*options[6:], *lengths), torch.int64, x.device, keep_alive)
    return (
        x.data_ptr(), x.stride(0), *x.shape, reals, real_rows, integers, integer_rows,
        bias_address, bias_stride, history_address, history_stride, length, tokens.data_ptr(),
    )  # fmt: skip


class Call:
    """`sample` with the same shape and options once more, which have been checked: numbers, but for `sequence`."""

    def __init__(self, logits: Tensor, options: Sequence[Option]) -> None:
        self._alive: list[Tensor] = []
        self._batch = len(logits)
        reals, real_rows = _split(options[:6], torch.float64, logits.device, self._alive)
        integers, integer_rows = _split((*options[6:], 0, 0), torch.int64, logits.device, self._alive)
        self._sizes = logits.stride(0), *logits.shape, reals, real_rows
        self._integers, self._integer_rows = integers[:3], integer_rows
        self._kernel = native.CPU.require().sample

    def __call__(self, logits: Tensor, position: int) -> Tensor | None:
        """The tokens [B]; None where a row is refused."""
        tokens = torch.empty(self._batch, dtype=torch.int64, device="cpu")
        refused = self._kernel(
            logits.data_ptr(), *self._sizes, [*self._integers, position, 0, 0], self._integer_rows,
            0, 0, 0, 0, 0, tokens.data_ptr(), native.num_threads(),
        )  # fmt: skip
        return tokens if refused < 0 else None


def run(
    logits: Tensor,
    options: Sequence[Option],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Option | None,
    prompt_lengths: Option | None,
) -> Tensor:
    """See `fastlm.reference.sample.sample`."""
    x = logits if logits.dtype == torch.float32 else logits.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    alive: list[Tensor] = []
    tokens = torch.empty(len(x), dtype=torch.int64, device="cpu")
    given = arguments(x, options, logit_bias, history, history_lengths, prompt_lengths, tokens, alive)
    refused = native.CPU.require().sample(*given, native.num_threads())
    if refused >= 0:
        # The reference says what is wrong with the row.
        reference.sample(logits, options, logit_bias, history, history_lengths, prompt_lengths)
        raise AssertionError(f"sample: the kernel refused row {refused}, the reference did not")
    return tokens
