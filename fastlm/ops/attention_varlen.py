"""Attention of sequences of different lengths that lie one behind another, without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.attention import check_options, check_training_options
from fastlm.ops.attention_kernels import by_triton, each_sequence, triton_why_not
from fastlm.ops.attention_traced import traced_attention
from fastlm.ops.checks import describe, expect_shape, refuse
from fastlm.ops.library import tracing
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import attention as reference
from fastlm.reference.attention import Options, Packing

__all__ = ["attention_varlen"]


def _triton_run(query: Tensor, key: Tensor, value: Tensor, packing: Packing, *options: Any) -> Tensor:
    return by_triton(query, key, value, Options(*options)._replace(packing=packing))[0]


def _triton_why_not(query: Tensor, key: Tensor, value: Tensor, packing: Packing, *options: Any) -> str | None:
    return triton_why_not(query, key, value, *options)


def _each_why_not(query: Tensor, key: Tensor, value: Tensor, packing: Packing, *options: Any) -> str | None:
    return refuse((not query.is_cpu, f"a tensor is on {query.device}"))


def _reference_run(*args: Any) -> Tensor:
    return reference.attention_varlen(*args)[0]


ATTENTION_VARLEN = Op(
    "attention_varlen",
    [
        Implementation("triton", _triton_run, _triton_why_not),
        Implementation("cpu", each_sequence, _each_why_not),
        Implementation("reference", _reference_run, always),
    ],
)


def _starts(name: str, starts: Tensor, total: int) -> Tensor:
    if starts.dim() != 1 or len(starts) < 2 or starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"attention_varlen: {name} is {describe(starts)}, expected int32 or int64 [B + 1]")
    # A look at what lies on another device would wait for it, and a graph that is traced has no values yet.
    if starts.is_cpu and not tracing():
        found = starts.tolist()
        if found[0] != 0 or found[-1] != total or any(a > b for a, b in pairwise(found)):
            raise ValueError(f"attention_varlen: {name} is {found}, expected numbers that rise from 0 to {total}")
    return starts


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    top_left: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention` of each of B sequences to itself alone, packed one behind another.

    Args:
        query: [sum of Tq, H, D], any floating dtype.
        key: [sum of Tk, KVH, D].
        value: [sum of Tk, KVH, Dv].
        cu_seqlens_q: [B + 1] int32 or int64, rising from 0 to the sum of Tq: where each sequence begins, and the end.
        cu_seqlens_k: the same for keys and values; that of the queries if None.
        max_seqlen_q: no sequence of queries is longer. Found out if None, for which a GPU's queue has to be waited for;
            under torch.compile, which can't, the sum of Tq takes its place, at the price of idle blocks.
        max_seqlen_k: the same for keys.
        causal: this and all others as in `attention`; `alibi_slopes` are [H] or [B, H].

    Returns:
        [sum of Tq, H, Dv], the query's dtype.

    Raises:
        ValueError: a shape, dtype or option is not as described.
    """
    op = "attention_varlen"
    if query.dim() != 3:
        raise ValueError(f"{op}: query is {describe(query)}, expected shape [sum of Tq, H, D]")
    total, heads, dim = query.shape
    expect_shape(op, "key", key, ("sum of Tk", "KVH", dim))
    expect_shape(op, "value", value, (*key.shape[:2], "Dv"))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: key has {key.shape[1]} heads, expected a divisor of the query's {heads}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected the query's dtype {query.dtype}")
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, total)
    starts_k = starts_q
    if cu_seqlens_k is not None or len(key) != total:
        starts_k = _starts("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, len(key))
    if len(starts_k) != len(starts_q):
        raise ValueError(f"{op}: cu_seqlens_k is {describe(starts_k)}, expected shape [{len(starts_q)}]")
    check_options(
        op, query[None].expand(len(starts_q) - 1, *query.shape).transpose(1, 2), window, softcap, alibi_slopes
    )
    o = Options(
        causal, None, dim**-0.5 if scale is None else scale, window, softcap, alibi_slopes, dropout_p, top_left, sinks
    )
    check_training_options(op, o, heads)
    bounds = ((starts_q, max_seqlen_q, total), (starts_k, max_seqlen_k, len(key)))
    if tracing():
        longest = [bound if given is None else given for _, given, bound in bounds]
        return traced_attention(query, key, value, *o[:9], packing=Packing(starts_q, starts_k, *longest))[0]
    longest = [int(starts.diff().max()) if given is None else given for starts, given, _ in bounds]
    result: Tensor = ATTENTION_VARLEN(query, key, value, Packing(starts_q, starts_k, *longest), *o[:9])
    return result
