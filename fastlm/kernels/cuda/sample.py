"""`sample` by the CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.kernels import cuda, native
from fastlm.kernels.cpu.sample import arguments
from fastlm.reference import sample as reference
from fastlm.reference.sample import Option

__all__ = ["run", "why_not"]

# Zeroed once; the kernel leaves it so. By device, stream and layout, since two streams may sample at the same time.
_scratch: dict[tuple[object, ...], Tensor] = {}


def why_not(logits: Tensor, *_: object) -> str | None:
    # Other floating dtypes become float32; that of the bias does not matter.
    return cuda.why_not(logits if logits.dtype in cuda.STORAGES else logits[:0].float())


def run(
    logits: Tensor,
    options: Sequence[Option],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Option | None,
    prompt_lengths: Option | None,
) -> Tensor:
    """See `fastlm.reference.sample.sample`. While a CUDA graph is being recorded rows that can't be drawn from get the
    token -1; else the host waits for the tokens, and refuses them."""
    module = native.CUDA.require()
    x = logits if logits.dtype in cuda.STORAGES else logits.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    recording = native.values_unknown()
    stream = cuda.stream(x.device)
    batch, vocab = x.shape
    key = (x.device, stream, batch, vocab, history is not None)
    scratch = None if recording else _scratch.get(key)
    if scratch is None:
        scratch = torch.zeros(
            module.sample_scratch(batch, vocab, history is not None), dtype=torch.uint8, device=x.device
        )
        if not recording:  # a graph keeps memory of its own
            _scratch.clear()
            _scratch[key] = scratch
    alive: list[Tensor] = []
    tokens = torch.empty(batch, dtype=torch.int64, device=x.device)
    given = arguments(x, options, logit_bias, history, history_lengths, prompt_lengths, tokens, alive)
    with torch.cuda.device_of(x):
        module.sample(*given, cuda.STORAGES[x.dtype], scratch.data_ptr(), stream)
    if not recording and bool((tokens < 0).any()):
        # The reference says what is wrong with the row.
        reference.sample(logits, options, logit_bias, history, history_lengths, prompt_lengths)
        raise AssertionError("sample: the kernel refused a row, the reference did not")
    return tokens
