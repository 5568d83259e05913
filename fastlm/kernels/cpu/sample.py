"""`sample` by the native kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlm.kernels import native
from fastlm.reference import sample as reference
from fastlm.reference.sample import Option

__all__ = ["arguments", "forget", "known", "remember", "run", "why_not"]


def why_not(logits: Tensor, *_: object) -> str | None:
    if native.CPU.module is None:
        return native.CPU.error
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if type(logits) is not Tensor and type(logits) is not Parameter:
        return f"logits are a {type(logits).__name__}; the kernel takes plain tensors"
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


# (logits, options as `_run` of fastlm.ops.sample has them, threads): the tokens [B] if logits of this layout and these
# options, but for the position, were remembered and no row is refused; else None. None are where torch does not show
# its tensors to native code.
known: Callable[..., Tensor | None] | None = None
if native.shows_tensors():
    known = native.CPU.require().sample_known


def remember(logits: Tensor, given: Sequence[object], options: Sequence[Option]) -> None:
    """Lets `known` serve calls like this one, which was checked and which `why_not` has nothing against.

    Args:
        logits: float32, contiguous along the vocabulary.
        given: the options without the position, as float, int or None.
        options: all of them as numbers, but for `sequence`, which may be a tensor [B].
    """
    alive: list[Tensor] = []
    native.CPU.require().sample_remember(
        logits.stride(0), *logits.shape,
        *_split(options[:6], torch.float64, logits.device, alive),
        *_split((*options[6:], 0, 0), torch.int64, logits.device, alive),
        tuple(given), torch.empty_like, torch.empty(len(logits), dtype=torch.int64, device="cpu"), alive,
    )  # fmt: skip


def forget() -> int:
    """Forgets what was remembered; returns how many calls that were."""
    return int(native.CPU.require().sample_forget())


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
