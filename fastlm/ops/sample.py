"""Drawing the next token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import sample as cpu
from fastlm.kernels.cuda import sample as cuda
from fastlm.ops.checks import describe
from fastlm.ops.library import plain, tracing
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import sample as reference
from fastlm.reference.sample import Option

__all__ = ["sample"]

SAMPLE = Op(
    "sample",
    [
        Implementation("cpu", cpu.run, cpu.why_not),
        Implementation("cuda", cuda.run, cuda.why_not),
        Implementation("reference", reference.sample, always),
    ],
)

_LARGEST = float(torch.finfo(torch.float32).max)

# In the order of the normalised options: name, what is accepted, in words. NaN fails every comparison.
_CHECKS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda v: 0 <= v < math.inf, "a finite number >= 0"),
    ("top_p", lambda v: 0 < v <= 1, "0 < top_p <= 1"),
    ("min_p", lambda v: 0 <= v <= 1, "0 <= min_p <= 1"),
    ("repetition_penalty", lambda v: 2**-126 <= v <= _LARGEST, "a positive number within float32"),
    ("presence_penalty", lambda v: -_LARGEST <= v <= _LARGEST, "a finite number within float32"),
    ("frequency_penalty", lambda v: -_LARGEST <= v <= _LARGEST, "a finite number within float32"),
    ("top_k", lambda v: 0 <= v < 2**63, "an integer >= 0 (0: all tokens)"),
    ("seed", lambda v: -(2**63) <= v < 2**64, "an integer of 64 bits"),
    ("sequence", lambda v: -(2**63) <= v < 2**64, "an integer of 64 bits"),
    ("position", lambda v: 0 <= v < 2**32, "0 <= position < 2^32"),
)
_REALS = 6


@functools.lru_cache(maxsize=64)
def _row_numbers(batch: int) -> Tensor:
    return torch.arange(batch, device="cpu")


def _check_rows(name: str, value: Tensor, batch: int, integer: bool) -> None:
    if value.shape != (batch,):
        raise ValueError(f"sample: {name} is {describe(value)}, expected a number or shape [{batch}]")
    if value.dtype == torch.bool or value.is_complex() or (integer and value.is_floating_point()):
        raise ValueError(f"sample: {name} is {describe(value)}, expected {'integers' if integer else 'numbers'}")


@functools.lru_cache(maxsize=1024)
def _number(index: int, value: float) -> float | int:
    """Option number `index` as a float or an int of 64 bits."""
    name, accepts, words = _CHECKS[index]
    if not accepts(value) or (index >= _REALS and value != int(value)):
        raise ValueError(f"sample: {name} is {value}, expected {words}")
    if index < _REALS:
        return float(value)
    return int(value) if value < 2**63 else int(value) - 2**64


def _normalised(index: int, value: Option, batch: int) -> Option:
    """Option number `index` as a number, or as a tensor [B] with every element checked."""
    kind = type(value)
    if kind is float or kind is int:
        return _number(index, value)
    name, accepts, words = _CHECKS[index]
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return _number(index, value.item())
        _check_rows(name, value, batch, index >= _REALS)
        if native.values_unknown():
            return value
        for row, element in enumerate(value.tolist()):
            if not accepts(element):
                raise ValueError(f"sample: {name} of row {row} is {element}, expected {words}")
        return value
    for protocol, convert in (("__index__", int), ("__float__", float)):  # bool, numpy's numbers
        if hasattr(value, protocol):
            return _number(index, convert(value))
    raise TypeError(f"sample: {name} is a {kind.__name__}, expected a number or a tensor")


def _lengths(name: str, value: Option | None, batch: int, longest: int) -> Option | None:
    if isinstance(value, Tensor) and value.dim() > 0:
        _check_rows(name, value, batch, True)
        if native.values_unknown():
            return value
    values = value.tolist() if isinstance(value, Tensor) else value
    for length in values if isinstance(values, list) else [values]:
        if length is not None and not 0 <= length <= longest:
            raise ValueError(f"sample: {name} is {values}, expected 0 <= {name} <= {longest}")
    return value if isinstance(values, list) else values


def _dense_bias(bias: Mapping[int, float] | Tensor, logits: Tensor) -> Tensor:
    """The bias as [B, V]."""
    batch, vocab = logits.shape
    if isinstance(bias, Mapping):
        for token, value in bias.items():
            if not 0 <= token < vocab:
                raise ValueError(f"sample: logit_bias has token {token}, expected 0 <= token < {vocab}")
            if not value < math.inf:
                raise ValueError(f"sample: logit_bias of token {token} is {value}, expected a number below +inf")
        dense = torch.zeros(vocab)
        dense[list(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32)
        return dense.to(logits.device).expand(batch, vocab)
    if bias.shape not in ((vocab,), (batch, vocab)) or not bias.is_floating_point():
        raise ValueError(
            f"sample: logit_bias is {describe(bias)}, expected floats of shape [{vocab}] or [{batch}, {vocab}]"
        )
    return bias.to(logits.device).expand(batch, vocab)


def _run(
    logits: Tensor,
    options: Sequence[Option],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Option | None,
    prompt_lengths: Option | None,
) -> Tensor:
    """Checks everything but the logits' values, which the implementations check as they go, and runs."""
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"sample: logits is {describe(logits)}, expected floats of shape [batch, vocabulary >= 1]")
    if logits.shape[1] > reference.MOST_TOKENS:
        raise ValueError(f"sample: logits have {logits.shape[1]} tokens, expected at most {reference.MOST_TOKENS}")
    batch = logits.shape[0]
    normalised = [_normalised(index, option, batch) for index, option in enumerate(options)]
    if history is not None:
        if history.dim() != 2 or len(history) != batch:
            raise ValueError(f"sample: history is {describe(history)}, expected shape [{batch}, length]")
        _check_rows("history", history[:, 0] if history.shape[1] else history.new_zeros(batch), batch, True)
        history = history.to(logits.device, torch.int64)
        history_lengths = _lengths("history_lengths", history_lengths, batch, history.shape[1])
        prompt_lengths = _lengths("prompt_lengths", prompt_lengths, batch, history.shape[1])
    elif history_lengths is not None or prompt_lengths is not None:
        name = "history_lengths" if history_lengths is not None else "prompt_lengths"
        raise ValueError(f"sample: {name} is given, but history is not")
    return SAMPLE(logits, normalised, logit_bias, history, history_lengths, prompt_lengths)


@torch.library.custom_op("fastlm::sample", mutates_args=())
def _sample(
    logits: Tensor,
    options: Sequence[Tensor],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Tensor | None,
    prompt_lengths: Tensor | None,
) -> Tensor:
    return _run(logits, options, logit_bias, history, history_lengths, prompt_lengths)


@_sample.register_fake
def _(
    logits: Tensor,
    options: Sequence[Tensor],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Tensor | None,
    prompt_lengths: Tensor | None,
) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


def _as_tensor(value: Option, real: bool) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64 if real else torch.int64)


def sample(
    logits: Tensor,
    *,
    temperature: Option = 1.0,
    top_k: Option = 0,
    top_p: Option = 1.0,
    min_p: Option = 0.0,
    repetition_penalty: Option = 1.0,
    presence_penalty: Option = 0.0,
    frequency_penalty: Option = 0.0,
    logit_bias: Tensor | Mapping[int, float] | None = None,
    history: Tensor | None = None,
    history_lengths: Option | None = None,
    prompt_lengths: Option | None = None,
    seed: Option = 0,
    sequence: Option | None = None,
    position: Option = 0,
) -> Tensor:
    """Draws one token per row. The same (seed, sequence, position) and logits give the same token on every backend,
    instruction set, batch size and thread count; `fastlm/reference/sample.py` is the exact specification.

    Every option is a number, or a tensor [B] with one for each row. They apply in the order of transformers: bias,
    repetition penalty, presence and frequency penalty, temperature, top_k, top_p, min_p. Equal logits rank by id.

    Args:
        logits: [B, V], any floating dtype; computed in float32. -inf forbids a token.
        temperature: divides the logits. 0: the largest logit, the lowest id of equal ones.
        top_k: keeps the k most likely tokens; 0: all.
        top_p: keeps the smallest set of most likely tokens that has this share of what top_k kept (Holtzman et al.,
            2019, https://arxiv.org/abs/1904.09751).
        min_p: keeps tokens at least this times as likely as the likeliest (https://arxiv.org/abs/2407.01082).
        repetition_penalty: logits of tokens in the history are divided by it where positive, multiplied where
            negative (Keskar et al., 2019, https://arxiv.org/abs/1909.05858).
        presence_penalty: subtracted from the logits of tokens generated so far.
        frequency_penalty: subtracted once for each time the token was generated.
        logit_bias: added to the logits: [V], [B, V], or {token id: bias} for all rows. A tensor saves building one
            at each call.
        history: [B, L] token ids, prompt first. Read only where a penalty is set.
        history_lengths: how many entries of each row's history count; None: all.
        prompt_lengths: how many of these are the prompt, which presence and frequency do not count; None: none.
        seed: the random key, 64 bits.
        sequence: which sequence each row is, 64 bits; None: the row's number.
        position: the position of the token in its sequence, below 2^32.

    Returns:
        int64 [B] on the device of `logits`.

    Raises:
        ValueError: an option, shape or history id is out of range, or a row of logits has NaN, +inf or nothing but
            -inf after bias and penalties; it names the argument or row and what was wrong.
        TypeError: an option is not a number.
    """
    # Plain calls with the same options again and again: what was checked and chosen for these holds.
    known = cpu.known if logit_bias is history is history_lengths is prompt_lengths is None and plain() else None
    if known is not None:
        tokens = known(
            logits, temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, top_k, seed,
            sequence, position, native.num_threads(),
        )  # fmt: skip
        if tokens is not None:
            return tokens
    given = sequence
    bias = None if logit_bias is None else _dense_bias(logit_bias, logits)
    if sequence is None:
        batch = logits.shape[0]
        sequence = 0 if batch == 1 else torch.arange(batch) if tracing() else _row_numbers(batch)
    options = (
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        top_k,
        seed,
        sequence,
        position,
    )
    if tracing():
        tensors = [_as_tensor(option, index < _REALS) for index, option in enumerate(options)]
        lengths = [None if n is None else _as_tensor(n, False) for n in (history_lengths, prompt_lengths)]
        return _sample(logits, tensors, bias, history, *lengths)
    result = _run(logits, options, bias, history, history_lengths, prompt_lengths)
    asked = (*options[:8], given)
    if (
        known is not None
        and type(position) is int
        and all(type(option) in (float, int, type(None)) for option in asked)
        and logits.dtype == torch.float32
        and logits.stride(1) == 1
        and cpu.why_not(logits) is None
    ):
        batch = len(logits)
        cpu.remember(logits, asked, [_normalised(index, option, batch) for index, option in enumerate(options)])
    return result
