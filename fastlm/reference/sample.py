"""Sampling a token from logits, in arithmetic that every implementation can repeat bit by bit.

The same (seed, sequence, position) must give the same token whatever computes it, in whatever order and on however
many threads. Hence float32 operations that each round once, in the order written here, and from then on integers,
whose sums do not depend on their order:

1. Logits as float32, plus bias; then the penalties, on the ids of the history alone.
2. Relative probability e = 2^y, y = max((x - max x) * log2(e) / T, -40), by a fixed polynomial; weight
   w = e * 2^38 rounded to an integer. So a token less likely than 2^-39 of the likeliest is never drawn.
3. top_k keeps the first k by x, top_p the shortest prefix by e whose weight is at least top_p of what top_k kept,
   min_p those with e >= min_p; equal values in order of id. Each keeps a prefix of one order, the likeliest first.
4. Draws by rejection. Nobody has to find where top_p cuts: draw from all candidates; a token that lies beyond the cut
   is refused, and the next draw is among those ahead of it. One that lies within it is the result; it has the
   distribution of the kept tokens, as each of these was as likely as its weight in every draw. A refusal leaves a
   uniform share of the weight, so 1 + ln(1/top_p) draws are expected. Draw r uses lane r of the random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.reference.philox import random64

__all__ = [
    "MOST_TOKENS",
    "BadLogits",
    "Option",
    "distribution",
    "processed_logits",
    "relative_probabilities",
    "sample",
]

Option = float | int | Tensor
"""A number for all rows or a tensor [B]."""


class BadLogits(ValueError):
    """A row from which nothing can be drawn: a logit is NaN or +inf, or all are -inf."""


# 2^f = 1 + f * q(f) for |f| <= 1/2, q the minimax polynomial, lowest power first: relative error 9e-8.
EXP2 = ("0x1.62e42ap-1", "0x1.ebf9bcp-3", "0x1.c6b752p-5", "0x1.3cea88p-7", "0x1.5bba14p-10")
WEIGHT_BITS = 38
MOST_TOKENS = 2**25 - 1
"""The largest vocabulary: the weights' sum is less than 2^63."""
_SMALLEST, _LARGEST = 2.0**-126, float(torch.finfo(torch.float32).max)


def _float32(value: float, like: Tensor) -> Tensor:
    """A number rounded to float32, in the shape of `like`: torch may compute otherwise for a Python number."""
    return torch.full_like(like, torch.tensor(value, dtype=torch.float32).item())


def processed_logits(
    logits: Tensor, bias: Tensor | None, history: Tensor | None, prompt_length: int, penalties: Sequence[float]
) -> Tensor:
    """Step 1 for one row: logits [V], bias [V], history [L] ids; penalties are repetition, presence, frequency.

    A token of the history has its logit multiplied (below 0) or divided (else) by the repetition penalty; one that
    occurs n > 0 times from `prompt_length` on loses frequency * n and presence.

    Raises:
        ValueError: an id of the history is not in the vocabulary.
    """
    x = logits.float()
    if bias is not None:
        x = x + bias.float()
    repetition, presence, frequency = penalties
    if history is None or (repetition, presence, frequency) == (1, 0, 0):
        return x
    outside = history[(history < 0) | (history >= len(x))]
    if len(outside):
        raise ValueError(f"history has id {int(outside[0])}, expected 0 <= id < {len(x)}")
    seen = torch.bincount(history, minlength=len(x)) > 0
    generated = torch.bincount(history[prompt_length:], minlength=len(x))
    scale = _float32(repetition, x)
    x = torch.where(seen, torch.where(x < 0, x * scale, x / scale), x)
    penalised = x - _float32(frequency, x) * generated.float()
    return torch.where(generated > 0, penalised - _float32(presence, x), x)


def relative_probabilities(x: Tensor, temperature: float) -> Tensor:
    """Step 2 for one row: 2^max((x - max x) * log2(e) / T, -40) in float32; exactly 1 for the largest."""
    scale = min(max(math.log2(math.e) / temperature, _SMALLEST), _LARGEST)
    y = torch.clamp((x - x.max()) * _float32(scale, x), min=-40.0)
    n = torch.round(y)
    f = y - n
    coefficients = [float.fromhex(c) for c in EXP2]
    p = torch.full_like(f, coefficients[-1])
    for c in reversed([1.0, *coefficients[:-1]]):
        p = p * f
        p = p + c
    return (p.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)


def _weights(e: Tensor) -> Tensor:
    return torch.round(e.double() * 2.0**WEIGHT_BITS).to(torch.int64)


def _kept(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor, int, int]:
    """Steps 2 and 3: ids in order of probability, their weights, how many can be drawn, how many are kept."""
    ids = torch.argsort(x, descending=True, stable=True)
    if top_k > 0:
        ids = ids[:top_k]
    ids = ids.sort().values
    e, order = relative_probabilities(x[ids], temperature).sort(descending=True, stable=True)
    ids, weights = ids[order], _weights(e)
    candidates = int((e >= _float32(min_p, e)).sum())
    kept = candidates
    if top_p < 1:
        # In integers: top_p to 53 bits, and the smallest weight that is not less than that share of the total.
        wanted = (round(top_p * 2**53) * int(weights.sum()) + 2**53 - 1) >> 53
        ahead = weights.cumsum(0) - weights
        kept = min(kept, int((ahead < max(wanted, 1)).sum()))
    return ids, weights, candidates, kept


def distribution(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The probabilities [V], float64, with which `sample` draws from one row of processed logits."""
    probabilities = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if temperature == 0:
        probabilities[(x == x.max()).nonzero()[0]] = 1
        return probabilities
    ids, weights, _, kept = _kept(x, temperature, top_k, top_p, min_p)
    probabilities[ids[:kept]] = weights[:kept].double() / int(weights[:kept].sum())
    return probabilities


def _draw(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, counter: tuple[int, int, int]) -> int:
    if temperature == 0:
        return int((x == x.max()).nonzero()[0])
    ids, weights, candidates, kept = _kept(x, temperature, top_k, top_p, min_p)
    lane = 0
    while True:
        by_id = ids[:candidates].argsort()
        running = weights[by_id].cumsum(0)
        target = random64(*counter, lane) * int(running[-1]) >> 64
        rank = int(by_id[torch.searchsorted(running, target, right=True)])
        if rank < kept:
            return int(ids[rank])
        candidates, lane = rank, lane + 1


def sample(
    logits: Tensor,
    options: Sequence[Option],
    logit_bias: Tensor | None,
    history: Tensor | None,
    history_lengths: Option | None,
    prompt_lengths: Option | None,
) -> Tensor:
    """One token id per row: int64 [B].

    Args:
        logits: [B, V].
        options: temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, top_k, seed,
            sequence, position.
        logit_bias: [B, V] or None.
        history: int64 [B, L] or None; row b is valid up to history_lengths[b] (None: L) and generated from
            prompt_lengths[b] (None: 0) on.

    Raises:
        BadLogits: a row has NaN, +inf or nothing but -inf.
        ValueError: a history id is outside the vocabulary.
    """
    tokens = []
    for row in range(len(logits)):
        values = [float(_at(option, row)) for option in options[:6]]
        top_k, seed, sequence, position = (int(_at(option, row)) for option in options[6:])
        temperature, top_p, min_p, *penalties = values
        valid = None if history is None else history[row]
        if valid is not None and history_lengths is not None:
            valid = valid[: int(_at(history_lengths, row))]
        start = 0 if prompt_lengths is None else int(_at(prompt_lengths, row))
        try:
            x = processed_logits(logits[row], None if logit_bias is None else logit_bias[row], valid, start, penalties)
            _refuse(x)
        except ValueError as error:
            raise type(error)(f"sample: row {row}: {error}") from None
        tokens.append(_draw(x, temperature, top_k, top_p, min_p, (seed, sequence, position)))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _at(option: Option, row: int) -> float | int:
    return option[row].item() if isinstance(option, Tensor) else option


def _refuse(x: Tensor) -> None:
    for name, where in (("NaN", x.isnan()), ("+inf", x == math.inf)):
        if where.any():
            raise BadLogits(f"the logit of token {int(where.nonzero()[0])} is {name}")
    if x.max() == -math.inf:
        raise BadLogits("every logit is -inf, so there is nothing to draw")
