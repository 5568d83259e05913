"""Attention of new tokens to a key-value cache in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.attention import check_options
from fastlm.ops.attention_decode import ATTENTION_DECODE, triton_cache_why_not
from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.library import autograd_by_reference, tracing, triton_kernel
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import attention_decode as reference
from fastlm.reference.kv_cache import kv_read, kv_width

__all__ = ["attention_paged"]


def _triton_why_not(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> str | None:
    if (key_scale is not None or value_scale is not None) and key_pages.dtype != torch.float8_e4m3fn:
        return f"scales for a cache of {key_pages.dtype}; the kernel takes them with float8_e4m3fn"
    return triton_cache_why_not(
        query, key_pages, value_pages, block_table, lengths, key_scale, value_scale, alibi_slopes
    )


def _gathered(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Copies the pages together: never looks at the lengths' values, so no device has to wait."""
    first = torch.arange(block_table.shape[1], device=query.device) * key_pages.shape[2]
    table = torch.where(first < lengths[:, None], block_table, 0)  # what lies behind a sequence's pages may be anything
    wide = torch.promote_types(query.dtype, torch.float32)
    caches = []
    for pages, factor in ((key_pages, key_scale), (value_pages, value_scale)):
        cache = kv_read(pages[table].transpose(1, 2).flatten(2, 3), wide)  # [B, KVH, M page, D]
        caches.append((cache if factor is None else cache * factor.to(wide)[:, None, None]).to(query.dtype))
    (masked,) = (i.run for i in ATTENTION_DECODE.implementations if i.name == "torch")
    result: Tensor = masked(query, *caches, lengths, None, scale, window, softcap, alibi_slopes)
    return result


def _gathered_why_not(query: Tensor, *_: object) -> str | None:
    if query.device.type == "cpu":
        return "on a CPU it would copy the whole cache, where the reference reads what is stored"
    return None


ATTENTION_PAGED = Op(
    "attention_paged",
    [
        Implementation("triton", triton_kernel("attention_decode", "attention_paged"), _triton_why_not),
        Implementation("torch", _gathered, _gathered_why_not),
        Implementation("reference", reference.attention_paged, always),
    ],
)


@torch.library.custom_op("fastlm::attention_paged", mutates_args=())
def _attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    result: Tensor = ATTENTION_PAGED(
        query,
        key_pages,
        value_pages,
        block_table,
        lengths,
        key_scale,
        value_scale,
        scale,
        window,
        softcap,
        alibi_slopes,
    ).contiguous()
    return result


@_attention_paged.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


autograd_by_reference(_attention_paged, _gathered, differentiable=(0, 1, 2, 5, 6, 10))


def _check(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    expect_shape("attention_paged", "query", query, ("B", "H", "T", "D"))
    batch, heads, _, dim = query.shape
    dtypes = (query.dtype, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    width = kv_width(dim, key_pages.dtype)
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dim() != 4 or pages.shape != (*key_pages.shape[:3], width) or pages.dtype not in dtypes:
            raise ValueError(
                f"attention_paged: {name} is {describe(pages)}, expected {query.dtype}, bfloat16, int8 or "
                f"float8_e4m3fn of shape [P, KVH, page, {width}], the same for keys and values"
            )
    if value_pages.dtype != key_pages.dtype:
        raise ValueError(f"attention_paged: value_pages is {describe(value_pages)}, expected {key_pages.dtype} as keys")
    kv_heads = key_pages.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention_paged: key_pages has {kv_heads} heads, expected a divisor of the query's {heads}")
    if block_table.dim() != 2 or len(block_table) != batch or block_table.dtype != torch.int64:
        raise ValueError(
            f"attention_paged: block_table is {describe(block_table)}, expected int64 of shape [{batch}, M]"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(f"attention_paged: lengths is {describe(lengths)}, expected int64 of shape [{batch}]")
    for name, factor in (("key_scale", key_scale), ("value_scale", value_scale)):
        if factor is not None and (factor.shape not in ((1,), (kv_heads,)) or not factor.is_floating_point()):
            raise ValueError(
                f"attention_paged: {name} is {describe(factor)}, expected floats of shape [1] or [{kv_heads}]"
            )


def attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention_decode` with a cache in pages that sequences take as they grow (Kwon et al., 2023,
    https://arxiv.org/abs/2309.06180).

    Position s of sequence b is place s % page of page block_table[b, s // page]. What lies beyond a sequence's length
    is never read, nor are its further entries of the table. A page may belong to several sequences. A contiguous cache
    [R, KVH, S, D] is R pages, of which each sequence has one: block_table [B, 1].

    Args:
        query: [B, H, T, D], the T newest tokens of each sequence, whose keys and values the pages already hold.
        key_pages: [P, KVH, page, D], the query's dtype, bfloat16 or float8_e4m3fn, or int8 [P, KVH, page, D + 4] as
            `kv_append` writes it; KVH divides H as in `attention`.
        value_pages: like `key_pages`.
        block_table: int64 [B, M], pages of each sequence in order, each from 0 to P - 1.
        lengths: int64 [B], tokens of each sequence including the T new ones: T <= lengths[b] <= M * page.
        key_scale, value_scale: [1] or [KVH], what the stored numbers are to be multiplied with; 1 if None.
        scale, window, softcap, alibi_slopes: as in `attention`.

    Returns:
        [B, H, T, D], the query's dtype.

    Raises:
        ValueError: a shape, dtype or option is not as described; a length or page is out of range (checked on CPU).
    """
    _check(query, key_pages, value_pages, block_table, lengths, key_scale, value_scale)
    check_options("attention_paged", query, window, softcap, alibi_slopes)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    run = _attention_paged if tracing() else ATTENTION_PAGED
    return run(
        query,
        key_pages,
        value_pages,
        block_table,
        lengths,
        key_scale,
        value_scale,
        scale,
        window,
        softcap,
        alibi_slopes,
    )
