"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.kernels.cpu import attention as kernel
from fastlm.ops.checks import describe, refuse
from fastlm.ops.library import autograd_by_reference, needs_grad, opaque_kernel_why_not, tracing
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import attention as reference

__all__ = ["attention"]


class _Attention(torch.autograd.Function):
    """Attention by the native kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        output, lse = kernel.attention(query, key, value, *options, save=True)
        causal, mask, scale, window, softcap, alibi_slopes = options
        ctx.save_for_backward(query, key, value, output, lse, mask, alibi_slopes)
        ctx.options = causal, scale, window, softcap
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _AttentionGradients.apply(grad_output, *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None, None, None)


class _AttentionGradients(torch.autograd.Function):
    """The backward of `_Attention`, a function of its own so that differentiating it fails with a reason."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        *tensors, mask, alibi_slopes, causal, scale, window, softcap = given
        return kernel.attention_backward(*tensors, causal, mask, scale, window, softcap, alibi_slopes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "attention: the native backward has no derivative of its own; run the forward under "
            "fastlm.backend('reference') to differentiate it twice"
        )


def _cpu_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    *kept, _ = options  # the kernel has no dropout
    if needs_grad(query, key, value):
        result: Tensor = _Attention.apply(query, key, value, *kept)
        return result
    return kernel.attention(query, key, value, *kept)[0]


def _cpu_why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> str | None:
    return refuse(
        (dropout_p > 0, "the kernel has no dropout"),
        (needs_grad(mask, alibi_slopes), "a gradient of the mask or the slopes is wanted"),
        (0 in query.shape or 0 in key.shape or 0 in value.shape, "an empty query, key or value"),
        (
            any(t is not None and not t.is_cpu for t in (mask, alibi_slopes)),
            "the mask or the slopes are not on the CPU",
        ),
    ) or opaque_kernel_why_not(native.CPU, query, key, value)


def _torch_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    # bool(): the sizes are symbolic under torch.compile, and torch's own arguments must not be.
    causal = causal and bool(queries > 1)  # a single query is the last one, and sees every key
    if window is not None and window >= keys:
        window = None
    # torch aligns its own causal mask to the top left: it can be used where the two alignments agree.
    flag = causal and bool(queries == keys) and window is None and mask is None and alibi_slopes is None
    if not flag and (causal or window is not None or alibi_slopes is not None):
        mask = _one_mask(queries, keys, causal, mask, window, alibi_slopes, query)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(torch.promote_types(query.dtype, torch.float32))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=flag,
        scale=scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


def _one_mask(
    queries: int,
    keys: int,
    causal: bool,
    mask: Tensor | None,
    window: int | None,
    alibi_slopes: Tensor | None,
    query: Tensor,
) -> Tensor | None:
    """The options that torch has no argument for, as one mask: boolean if possible, else additive."""
    visible = reference.visible_keys(queries, keys, causal, window, query.device)
    bias = None
    if alibi_slopes is not None:
        bias = reference.alibi_bias(alibi_slopes, queries, keys, torch.promote_types(query.dtype, torch.float32))
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    if bias is None:
        return visible
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)


def _torch_why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> str | None:
    return refuse(
        (softcap is not None, "scaled_dot_product_attention has no softcap"),
        (0 in query.shape or 0 in key.shape or 0 in value.shape, "an empty query, key or value"),
    )


ATTENTION = Op(
    "attention",
    [
        Implementation("cpu", _cpu_run, _cpu_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", reference.attention, always),
    ],
)


@torch.library.custom_op("fastlm::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> Tensor:
    result: Tensor = ATTENTION(
        query, key, value, causal, mask, scale, window, softcap, alibi_slopes, dropout_p
    ).contiguous()
    return result


@_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


autograd_by_reference(_attention, ATTENTION, differentiable=(0, 1, 2, 4, 8))


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


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    if query.dim() != 4:
        raise ValueError(f"attention: query is {describe(query)}, expected shape [B, H, Tq, D]")
    batch, heads, queries, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"attention: key is {describe(key)}, expected shape [{batch}, KVH, Tk, {dim}]")
    kv_heads, keys = key.shape[1:3]
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"attention: value is {describe(value)}, expected shape [{batch}, {kv_heads}, {keys}, Dv]")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: key has {kv_heads} heads, expected a divisor of the query's {heads}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"attention: {name} is {describe(tensor)}, expected the query's dtype {query.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"attention: mask is {describe(mask)}, expected bool (True: attend) or a floating dtype")
        sizes = zip(reversed(mask.shape), (keys, queries, heads, batch), strict=False)
        if mask.dim() > 4 or any(have not in (1, want) for have, want in sizes):
            raise ValueError(
                f"attention: mask is {describe(mask)}, expected to broadcast to [{batch}, {heads}, {queries}, {keys}]"
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")


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
) -> Tensor:
    """softmax(cap(scale * Q K^T) + bias) V, with the masks, biases and head layouts that language models use.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762. Queries and keys are aligned at their ends: query i stands
    at key position i + Tk - Tq. A query that may see no key gives 0, with finite gradients.

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

    Returns:
        [B, H, Tq, Dv], the query's dtype.

    Raises:
        ValueError: a shape, dtype or option is not as described.
    """
    _check(query, key, value, mask, dropout_p)
    check_options("attention", query, window, softcap, alibi_slopes)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    args = (query, key, value, causal, mask, scale, window, softcap, alibi_slopes, dropout_p)
    if not tracing():
        return ATTENTION(*args)
    if dropout_p == 0.0:
        return _attention(*args)
    # A custom op's backward runs its forward again, and would draw another dropout mask: trace the formula instead.
    return reference.attention(*args) if _torch_why_not(*args) else _torch_run(*args)
