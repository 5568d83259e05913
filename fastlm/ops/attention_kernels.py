"""The implementations of attention: which kernel serves a call, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.kernels import native
from fastlm.kernels.cpu import attention as cpu
from fastlm.ops import library
from fastlm.ops.checks import refuse
from fastlm.ops.library import needs_grad, opaque_kernel_why_not, triton_kernel
from fastlm.ops.registry import Implementation, Op, always, forced_backend
from fastlm.reference import attention as reference
from fastlm.reference.attention import Options, Packing

__all__ = [
    "ATTENTION",
    "ATTENTION_LSE",
    "TRITON",
    "Kernel",
    "by_kernel",
    "by_triton",
    "dropout_seed",
    "each_sequence",
    "kernel_for",
    "triton_why_not",
]


class Kernel(NamedTuple):
    """A kernel of which autograd sees nothing."""

    forward: Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]]
    """query, key, value, options: the output and the log-sum-exp."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """The gradients of these two (the second may be None), query, key, value, output, log-sum-exp, options: the
    gradients of query, key, value and sinks."""
    gradient_of_lse: bool
    """Whether `backward` takes the second into account."""


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    return cpu.attention(query, key, value, *o[:6], save=True)


def _cpu_backward(grad_output: Tensor, grad_lse: Tensor | None, *given: Any) -> tuple[Tensor | None, ...]:
    *tensors, o = given
    return *cpu.attention_backward(grad_output, *tensors, *o[:6]), None


_CPU = Kernel(_cpu_forward, _cpu_backward, False)
TRITON = Kernel(triton_kernel("attention", "attention"), triton_kernel("attention", "attention_backward"), True)


class _Attention(torch.autograd.Function):
    """Output and log-sum-exp by a kernel. `sinks` are those of the options, seen by autograd."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, o: Options
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
    def forward(ctx: Any, kernel: Kernel, *given: Any) -> tuple[Tensor | None, ...]:
        return kernel.backward(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "attention: the native backward has no derivative of its own; run the forward under "
            "fastlm.backend('reference') to differentiate it twice"
        )


def by_kernel(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    if needs_grad(query, key, value, o.sinks):
        result: tuple[Tensor, Tensor] = _Attention.apply(kernel, query, key, value, o.sinks, o)
        return result
    return kernel.forward(query, key, value, o)


def _empty(*tensors: Tensor) -> bool:
    return any(0 in tensor.shape for tensor in tensors)


def _cpu_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    o = Options(*options)
    if needs_grad(query, key, value):
        return by_kernel(_CPU, query, key, value, o)[0]
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


def dropout_seed(query: Tensor, dropout_p: float) -> Tensor | None:
    """What a call draws for its dropout, int64 [1]."""
    return torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0 else None


def by_triton(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by Triton's kernels, with a seed drawn for dropout."""
    return by_kernel(TRITON, query, key, value, o._replace(seed=dropout_seed(query, o.dropout_p)))


def _triton_lse(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return by_triton(query, key, value, Options(*options))


def _triton_run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return by_triton(query, key, value, Options(*options))[0]


def _too_wide(query: Tensor, value: Tensor) -> bool:
    """Whether Triton's kernels have no gradients for it."""
    return query.dtype is torch.float32 and max(query.shape[-1], value.shape[-1]) > 128


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
            _too_wide(query, value) and needs_grad(query, key, value, o.sinks),
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


def each_sequence(query: Tensor, key: Tensor, value: Tensor, packing: Packing, *options: Any) -> Tensor:
    """Each sequence by itself, by whatever implementation of `attention` is best for it."""
    found = [ATTENTION(*one, *o) for *one, o in reference.sequences(query, key, value, packing, Options(*options))]
    return torch.cat([output[0].transpose(0, 1) for output in found])


def kernel_for(query: Tensor, key: Tensor, value: Tensor, o: Options, *, gradients: bool) -> Kernel | None:
    """The kernel that the ops above would choose for tensors that autograd does not watch; one with gradients too."""
    if forced_backend() in (None, "triton") and triton_why_not(query, key, value, *o[:9]) is None:
        return None if gradients and _too_wide(query, value) else TRITON
    if forced_backend() in (None, "cpu") and o.packing is None and _cpu_why_not(query, key, value, *o[:9]) is None:
        return _CPU
    return None
