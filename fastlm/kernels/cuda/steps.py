"""Packed sequences, gone through step by step: what the LSTM and the GRU have in common on a GPU.

`batch_sizes` rows run at each time, those of time 0 first; states of all steps [N, H] are kept where those rows are, so
that a step's kernel reads what the one before wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.reference.recurrent import NORM_EPS

__all__ = ["final", "gradient_of_gain", "initial_gradient", "previous", "product_backward", "steps", "times"]


def times(batch_sizes: Sequence[int], reverse: bool) -> list[slice]:
    """The rows of each step, in the order of computation."""
    starts = list(accumulate(batch_sizes, initial=0))
    found = [slice(start, start + running) for start, running in zip(starts, batch_sizes, strict=False)]
    return found[::-1] if reverse else found


def steps(first: Tensor, after: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each step, and the state [running, H] that it begins with: of `first` [B, H], or what the step before
    has left in `after` [N, H] by the time it is asked for."""
    before = slice(0, 0)
    for at in times(batch_sizes, reverse):
        running = at.stop - at.start
        known = min(running, before.stop - before.start)
        state = after[before.start : before.start + known] if known else first[:running]
        yield at, state if known in (0, running) else torch.cat([state, first[known:running]])
        before = at


def previous(first: Tensor, after: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """The state [N, H] that each row of each step began with."""
    states = [state for _, state in steps(first, after, batch_sizes, reverse)]
    return torch.cat(states[::-1] if reverse else states)


def final(after: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """The state [B, H] that each row ended with."""
    if reverse:
        return after[: batch_sizes[0]].clone()
    ended = [
        after[at.start + going_on : at.stop]
        for at, going_on in zip(times(batch_sizes, False), [*batch_sizes[1:], 0], strict=True)
        if going_on < at.stop - at.start
    ]
    return torch.cat(ended[::-1])


def initial_gradient(state: Tensor, grad: Tensor | None) -> Tensor:
    """Of a final state, to be changed as the steps are gone through backward."""
    return torch.zeros_like(state) if grad is None else grad.clone(memory_format=torch.contiguous_format)


def product_backward(grad_h: Tensor, grad_product: Tensor, w_hh: Tensor, dropout: Tensor | None) -> None:
    """Adds to the gradient of h [running, H] what comes through W_hh (m h)."""
    if dropout is None:
        grad_h.addmm_(grad_product, w_hh)
    else:
        grad_h.addcmul_(grad_product @ w_hh, dropout[: len(grad_h)])


def gradient_of_gain(grad_normed: Tensor, product: Tensor) -> Tensor:
    """Of a gain, given that of gain * hat(product) [N, G*H]."""
    hat = functional.layer_norm(product.float(), product.shape[-1:], eps=NORM_EPS)
    return (grad_normed.float() * hat).sum(0).to(product.dtype)
