"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops.attention_kernels import ATTENTION, ATTENTION_LSE
from fastlm.ops.attention_traced import traced_attention
from fastlm.ops.checks import describe
from fastlm.ops.library import tracing
from fastlm.reference.attention import Options

__all__ = ["attention", "attention_lse", "check_options", "check_training_options"]


def check_options(
    op: str, query: Tensor, window: int | None, softcap: float | None, alibi_slopes: Tensor | None
) -> None:
    """Checks what `attention` and `attention_decode` have in common."""
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap is {softcap}, expected a number above 0, or None")
    if alibi_slopes is not None:
        batch, heads = query.shape[:2]
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes is {describe(alibi_slopes)}, expected shape [{heads}] or [{batch}, {heads}]"
            )


def check_training_options(op: str, o: Options, heads: int) -> None:
    """Checks what `attention` and `attention_varlen` have in common beyond `check_options`."""
    if not 0 <= o.dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {o.dropout_p}, expected 0 <= dropout_p < 1")
    if o.sinks is not None and o.sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks is {describe(o.sinks)}, expected shape [{heads}]")


def _check(op: str, query: Tensor, key: Tensor, value: Tensor, o: Options) -> None:
    mask = o.mask
    if query.dim() != 4:
        raise ValueError(f"{op}: query is {describe(query)}, expected shape [B, H, Tq, D]")
    batch, heads, queries, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"{op}: key is {describe(key)}, expected shape [{batch}, KVH, Tk, {dim}]")
    kv_heads, keys = key.shape[1:3]
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{op}: value is {describe(value)}, expected shape [{batch}, {kv_heads}, {keys}, Dv]")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: key has {kv_heads} heads, expected a divisor of the query's {heads}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected the query's dtype {query.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{op}: mask is {describe(mask)}, expected bool (True: attend) or a floating dtype")
        sizes = zip(reversed(mask.shape), (keys, queries, heads, batch), strict=False)
        if mask.dim() > 4 or any(have not in (1, want) for have, want in sizes):
            raise ValueError(
                f"{op}: mask is {describe(mask)}, expected to broadcast to [{batch}, {heads}, {queries}, {keys}]"
            )
    check_options(op, query, o.window, o.softcap, o.alibi_slopes)
    check_training_options(op, o, heads)


def _normalised(op: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None, o: Options) -> tuple[Any, ...]:
    """The arguments as implementations take them."""
    _check(op, query, key, value, o)
    mask = o.mask
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query, key, value, *o._replace(mask=mask, scale=scale)[:9])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    top_left: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale * Q K^T) + bias) V, with the masks, biases and head layouts that language models use.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762. Queries and keys are aligned at their ends: query i stands
    at key position i + Tk - Tq; or with `top_left` at their starts. A query that may see no key gives 0, with finite
    gradients. Gradients of query, key, value and sinks are the same bits every time.

    Args:
        query: [B, H, Tq, D], any floating dtype.
        key: [B, KVH, Tk, D]; KVH divides H, and query head h reads key head h // (H / KVH).
        value: [B, KVH, Tk, Dv].
        causal: a query sees no key beyond its own position.
        mask: broadcastable to [B, H, Tq, Tk]. Bool: True where the query may see the key. Floating: added to the
            scores. Combined with `causal` and `window`.
        scale: factor of the scores; 1 / sqrt(D) if None.
        window: a query sees no key `window` or more positions before its own (so 1 leaves its own alone).
        softcap: scores become softcap * tanh(scores / softcap), before any bias or mask (Gemma 2).
        alibi_slopes: [H] or [B, H]; slope * (key position - query position) is added to the scores
            (Press et al., 2021, https://arxiv.org/abs/2108.12409).
        dropout_p: probability of dropping an attention weight, drawn from torch's generator. Applied whenever it is
            above 0: callers pass 0 outside training.
        top_left: query i stands at key position i, for `causal`, `window` and `alibi_slopes`.
        sinks: [H], one more score in each softmax of its head, of a key whose value is 0: what a query may attend to
            where nothing matters (Xiao et al., 2023, https://arxiv.org/abs/2309.17453; learned as in gpt-oss).

    Returns:
        [B, H, Tq, Dv], the query's dtype.

    Raises:
        ValueError: a shape, dtype or option is not as described.
    """
    o = Options(causal, mask, 1.0, window, softcap, alibi_slopes, dropout_p, top_left, sinks)
    args = _normalised("attention", query, key, value, scale, o)
    if tracing():
        return traced_attention(*args)[0]
    result: Tensor = ATTENTION(*args)
    return result


def attention_lse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`attention` and the log-sum-exp of each query's scores: what it takes to merge attention to parts of the keys.

    With o1, l1 over some keys and o2, l2 over the others, attention over all of them is
    exp(l1 - l) o1 + exp(l2 - l) o2 with l = logaddexp(l1, l2).

    Args:
        query: as the other arguments and `options`, those of `attention`.

    Returns:
        The output [B, H, Tq, Dv], and the log of the softmax's denominator, a sink included, [B, H, Tq], float32 (or
        float64 for float64 tensors): -inf for a query that sees nothing. Both have gradients.

    Raises:
        ValueError: a shape, dtype or option is not as described.
    """
    scale = options.pop("scale", None)
    o = Options(**{"causal": False, "mask": None, "scale": 1.0, **options})
    args = _normalised("attention_lse", query, key, value, scale, o)
    if tracing():
        return traced_attention(*args, want_lse=True)
    result: tuple[Tensor, Tensor] = ATTENTION_LSE(*args)
    return result
