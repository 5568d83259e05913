"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.kernels.cpu import attention as cpu
from fastlm.ops import library
from fastlm.ops.checks import describe, refuse
from fastlm.ops.library import autograd_by_reference, needs_grad, opaque_kernel_why_not, tracing, triton_kernel
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import attention as reference
from fastlm.reference.attention import Options

__all__ = ["attention", "attention_lse"]


class _Kernel(NamedTuple):
    """A kernel of which autograd sees nothing."""

    forward: Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]]
    """query, key, value, options: the output and the log-sum-exp."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """The gradients of these two (the second may be None), query, key, value, output, log-sum-exp, options: the
    gradients of query, key, value and sinks."""


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    return cpu.attention(query, key, value, *o[:6], save=True)


def _cpu_backward(grad_output: Tensor, grad_lse: Tensor | None, *given: Any) -> tuple[Tensor | None, ...]:
    *tensors, o = given
    return *cpu.attention_backward(grad_output, *tensors, *o[:6]), None


_CPU = _Kernel(_cpu_forward, _cpu_backward)
_TRITON = _Kernel(triton_kernel("attention", "attention"), triton_kernel("attention", "attention_backward"))


class _Attention(torch.autograd.Function):
    """Output and log-sum-exp by a kernel. `sinks` are those of the options, seen by autograd."""

    @staticmethod
    def forward(
        ctx: Any, kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, o: Options
    ) -> tuple[Tensor, Tensor]:
        output, lse = kernel.forward(query, key, value, o)
        ctx.names = [name for name, option in zip(o._fields, o, strict=True) if isinstance(option, Tensor)]
        ctx.save_for_backward(query, key, value, output, lse, *(getattr(o, name) for name in ctx.names))
        nothing: dict[str, Any] = dict.fromkeys(ctx.names)
        ctx.options, ctx.kernel = o._replace(**nothing), kernel
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, output, lse, *tensors = ctx.saved_tensors
        o = ctx.options._replace(**dict(zip(ctx.names, tensors, strict=True)))
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        given = (grad_output, grad_lse, query, key, value, output, lse, o)
        return None, *_AttentionGradients.apply(ctx.kernel, *given), None


class _AttentionGradients(torch.autograd.Function):
    """The backward of `_Attention`, a function of its own so that differentiating it fails with a reason."""

    @staticmethod
    def forward(ctx: Any, kernel: _Kernel, *given: Any) -> tuple[Tensor | None, ...]:
        return kernel.backward(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "attention: the native backward has no derivative of its own; run the forward under "
            "fastlm.backend('reference') to differentiate it twice"
        )


def _by_kernel(kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    if needs_grad(query, key, value, o.sinks):
        result: tuple[Tensor, Tensor] = _Attention.apply(kernel, query, key, value, o.sinks, o)
        return result
    return kernel.forward(query, key, value, o)


def _empty(*tensors: Tensor) -> bool:
    return any(0 in tensor.shape for tensor in tensors)


def _cpu_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    o = Options(*options)
    if needs_grad(query, key, value):
        return _by_kernel(_CPU, query, key, value, o)[0]
    return cpu.attention(query, key, value, *o[:6])[0]


def _cpu_why_not(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> str | None:
    o = Options(*options)
    return refuse(
        (o.dropout_p > 0, "the kernel has no dropout"),
        (o.sinks is not None, "the kernel has no sinks"),
        (o.top_left and query.shape[2] != key.shape[2], "the kernel aligns queries and keys at their ends"),
        (needs_grad(o.mask, o.alibi_slopes), "a gradient of the mask or the slopes is wanted"),
        (_empty(query, key, value), "an empty query, key or value"),
        (
            any(t is not None and not t.is_cpu for t in (o.mask, o.alibi_slopes)),
            "the mask or the slopes are not on the CPU",
        ),
    ) or opaque_kernel_why_not(native.CPU, query, key, value)


def _cpu_lse_why_not(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> str | None:
    if needs_grad(query, key, value):
        return "the kernel has no gradient of the log-sum-exp"
    return _cpu_why_not(query, key, value, *options)


def by_triton(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by Triton's kernels, with a seed drawn for dropout."""
    if o.dropout_p > 0:
        o = o._replace(seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=query.device))
    return _by_kernel(_TRITON, query, key, value, o)


def _triton_lse(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return by_triton(query, key, value, Options(*options))


def _triton_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return by_triton(query, key, value, Options(*options))[0]


def triton_why_not(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> str | None:
    o = Options(*options)
    features = max(query.shape[-1], value.shape[-1])
    return library.triton_why_not(query, key, value, o.mask, o.alibi_slopes, o.sinks) or refuse(
        (
            query.dtype not in (torch.float32, torch.float16, torch.bfloat16),
            f"{query.dtype}: the kernel takes float32, float16 and bfloat16",
        ),
        (features > 256, "more than 256 features a head"),
        (
            features > 128 and query.dtype is torch.float32 and needs_grad(query, key, value, o.sinks),
            "float32 gradients of more than 128 features a head: registers do not hold them",
        ),
        (not o.scale > 0, f"scale is {o.scale}: the kernel wants it above 0"),
        (needs_grad(o.mask, o.alibi_slopes), "a gradient of the mask or the slopes is wanted"),
        (_empty(query, key, value), "an empty query, key or value"),
    )


def _torch_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    o = Options(*options)
    queries, keys = query.shape[2], key.shape[2]
    # bool(): the sizes are symbolic under torch.compile, and torch's own arguments must not be.
    causal = o.causal and bool(queries > 1 or o.top_left)  # a single query at the end sees every key
    window = o.window
    if window is not None and window >= max(queries, keys):
        window = None
    # torch aligns its own causal mask to the top left: it can be used where the two alignments agree.
    aligned = bool(o.top_left or queries == keys)
    flag = causal and aligned and window is None and o.mask is None and o.alibi_slopes is None
    mask = o.mask
    if not flag and (causal or window is not None or o.alibi_slopes is not None):
        mask = _one_mask(queries, keys, query, o._replace(causal=causal, window=window))
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(torch.promote_types(query.dtype, torch.float32))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=o.dropout_p,
        is_causal=flag,
        scale=o.scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


def _one_mask(queries: int, keys: int, query: Tensor, o: Options) -> Tensor | None:
    """The options that torch has no argument for, as one mask: boolean if possible, else additive."""
    visible = reference.visible_keys(queries, keys, o.causal, o.window, query.device, o.top_left)
    mask, bias = o.mask, None
    if o.alibi_slopes is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = reference.alibi_bias(o.alibi_slopes, queries, keys, wide, o.top_left)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    if bias is None:
        return visible
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)


def _torch_why_not(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> str | None:
    o = Options(*options)
    return refuse(
        (o.softcap is not None, "scaled_dot_product_attention has no softcap"),
        (o.sinks is not None, "scaled_dot_product_attention has no sinks"),
        (_empty(query, key, value), "an empty query, key or value"),
    )


ATTENTION = Op(
    "attention",
    [
        Implementation("triton", _triton_run, triton_why_not),
        Implementation("cpu", _cpu_run, _cpu_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", reference.attention, always),
    ],
)


def _cpu_lse(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _cpu_forward(query, key, value, Options(*options))


ATTENTION_LSE = Op(
    "attention_lse",
    [
        Implementation("triton", _triton_lse, triton_why_not),
        Implementation("cpu", _cpu_lse, _cpu_lse_why_not),
        Implementation("reference", reference.attention_lse, always),
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
    top_left: bool,
    sinks: Tensor | None,
) -> Tensor:
    options = (causal, mask, scale, window, softcap, alibi_slopes, dropout_p, top_left, sinks)
    result: Tensor = ATTENTION(query, key, value, *options).contiguous()
    return result


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


autograd_by_reference(_attention, ATTENTION, differentiable=(0, 1, 2, 4, 8, 11))


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
    if not tracing():
        return ATTENTION(*args)
    if dropout_p == 0.0:
        return _attention(*args)
    # A custom op's backward runs its forward again, and would draw another dropout mask: trace the formula instead.
    return reference.attention(*args) if _torch_why_not(*args) else _torch_run(*args)


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
    result: tuple[Tensor, Tensor] = reference.attention_lse(*args) if tracing() else ATTENTION_LSE(*args)
    return result
