"""Attention as torch.compile and torch.export see it: one custom op for every door, and one for its gradients.

Both choose their kernel when they run. Where none has the gradients, theirs are found by running the best
implementation that autograd knows once more, with the same draws for dropout: the forward is then that one as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.attention_kernels import ATTENTION, ATTENTION_LSE, dropout_seed, each_sequence, kernel_for
from fastlm.ops.library import autograd_in_custom_op, needs_grad
from fastlm.reference.attention import Options, Packing

__all__ = ["traced_attention"]

_INPUTS = "Tensor query, Tensor key, Tensor value"
_OPTIONS = (
    "bool causal, Tensor? mask, float scale, int? window, float? softcap, Tensor? alibi_slopes, float dropout_p, "
    "bool top_left, Tensor? sinks, Tensor? seed, Tensor? starts_q, Tensor? starts_k, SymInt longest_q, SymInt longest_k"
)
_WITH_GRADIENTS = ("mask", "alibi_slopes", "sinks")


def _named(options: Sequence[Any]) -> Options:
    packing = None if options[10] is None else Packing(*options[10:])
    return Options(*options[:10])._replace(packing=packing)


def _heads_of_a_position_together(tensor: Tensor) -> Tensor:
    """[B, H, T, D] stored as [B, T, H, D], as kernels leave it and the next projection wants it."""
    return tensor.contiguous() if tensor.dim() < 4 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(tensor: Tensor, features: int) -> Tensor:
    """New memory for `tensor`'s shape but for the last dimension, laid out in that way."""
    if tensor.dim() == 3:
        return tensor.new_empty(*tensor.shape[:2], features)
    batch, heads, length, _ = tensor.shape
    return tensor.new_empty(batch, length, heads, features).transpose(1, 2)


def _empty_lse(query: Tensor) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0]), dtype=dtype)


@contextmanager
def _drawing(seed: Tensor | None) -> Iterator[None]:
    """Torch draws what the seed says, and then goes on as if it had drawn nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[seed.device] if seed.is_cuda else []):
        if seed.is_cuda:  # this device's generator alone, where torch.manual_seed would seed every device's
            with torch.cuda.device(seed.device):
                torch.cuda.manual_seed(int(seed))
        else:
            torch.default_generator.manual_seed(int(seed))
        yield


def _without_kernel(
    query: Tensor, key: Tensor, value: Tensor, o: Options, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    with _drawing(o.seed):
        if o.packing is not None:
            return each_sequence(query, key, value, o.packing, *o[:9]), None
        if not want_lse:
            return ATTENTION(query, key, value, *o[:9]), None
        found: tuple[Tensor, Tensor] = ATTENTION_LSE(query, key, value, *o[:9])
        return found


def _watched(
    query: Tensor, key: Tensor, value: Tensor, o: Options, wanted: Sequence[bool], want_lse: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """As `_without_kernel`, by an implementation with the wanted gradients: what they are of, and the results."""
    given = [query, key, value, *(getattr(o, name) for name in _WITH_GRADIENTS)]
    leaves = [t.detach().requires_grad_() if want else t for t, want in zip(given, wanted, strict=True)]
    o = o._replace(**dict(zip(_WITH_GRADIENTS, leaves[3:], strict=True)))
    output, lse = _without_kernel(leaves[0], leaves[1], leaves[2], o, want_lse)
    return [leaf for leaf, want in zip(leaves, wanted, strict=True) if want], output, lse


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, want_lse, watched = rest
    o = _named(options)
    wanted = [bool(watched >> place & 1) for place in range(3 + len(_WITH_GRADIENTS))]
    again = o.dropout_p > 0 and any(wanted)  # what the backward runs once more has to draw the same
    kernel = None if again and (wanted[3] or wanted[4]) else kernel_for(query, key, value, o, gradients=again)
    lse: Tensor | None
    if kernel is not None:
        output, lse = kernel.forward(query, key, value, o)
    elif again:
        with autograd_in_custom_op():
            _, output, lse = _watched(query, key, value, o, wanted, want_lse)
        output, lse = output.detach(), None if lse is None else lse.detach()
    else:
        output, lse = _without_kernel(query, key, value, o, want_lse)
    lse = _empty_lse(query).zero_() if lse is None else lse.contiguous()
    return _heads_of_a_position_together(output), lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(query, value.shape[-1]), _empty_lse(query)


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *options: Any,
) -> list[Tensor]:
    o = _named(options)
    kernel = kernel_for(query, key, value, o, gradients=True)
    if kernel is None or wanted[3] or wanted[4] or (grad_lse is not None and not kernel.gradient_of_lse):
        return _backward_by_autograd(grad_output, grad_lse, wanted, query, key, value, o)
    *grads, of_sinks = kernel.backward(grad_output, grad_lse, query, key, value, output, lse, o)
    found = [*grads, None, None, of_sinks]
    pairs = zip(found, wanted, strict=True)
    return [_heads_of_a_position_together(grad) for grad, want in pairs if want and grad is not None]


def _backward_by_autograd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    o: Options,
) -> list[Tensor]:
    with autograd_in_custom_op():
        wants, output, lse = _watched(query, key, value, o, wanted, grad_lse is not None)
        pairs = [(output, grad_output)] if lse is None else [(output, grad_output), (lse, grad_lse)]
    found = torch.autograd.grad([o for o, _ in pairs], wants, [g for _, g in pairs], allow_unused=True)
    # Copies, for an op's results may be no views of each other or of what it was given.
    return [_like(leaf).copy_(0.0 if grad is None else grad) for leaf, grad in zip(wants, found, strict=True)]


def _like(tensor: Tensor) -> Tensor:
    return _empty(tensor, tensor.shape[-1]) if tensor.dim() in (3, 4) else tensor.new_empty(tensor.shape)


def _backward_fake(grad_output: Tensor, grad_lse: Tensor | None, wanted: Sequence[bool], *rest: Any) -> list[Tensor]:
    query, key, value, _, _, *options = rest
    o = _named(options)
    tensors = [query, key, value, *(getattr(o, name) for name in _WITH_GRADIENTS)]
    return [_like(tensor) for tensor, want in zip(tensors, wanted, strict=True) if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *inputs_, ctx.want_lse, _ = inputs
    ctx.places = [place for place, value in enumerate(inputs_) if isinstance(value, Tensor)]
    ctx.given = [None if isinstance(value, Tensor) else value for value in inputs_]
    ctx.save_for_backward(*output, *(inputs_[place] for place in ctx.places))


def _vjp(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    output, lse, *tensors = ctx.saved_tensors
    given = list(ctx.given)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        given[place] = tensor
    places = [0, 1, 2, *(3 + Options._fields.index(name) for name in _WITH_GRADIENTS)]
    wanted = [ctx.needs_input_grad[place] for place in places]
    found = iter(
        _gradients(grad_output, grad_lse if ctx.want_lse else None, wanted, *given[:3], output, lse, *given[3:])
    )
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for place, want in zip(places, wanted, strict=True):
        grads[place] = next(found) if want else None
    return tuple(grads)


_attention: Any = torch.library.custom_op(
    "fastlm::attention",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool want_lse, int watched) -> (Tensor, Tensor)",
)
_attention.register_fake(_forward_fake)
_attention.register_autograd(_vjp, setup_context=_setup)
_gradients: Any = torch.library.custom_op(
    "fastlm::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor? grad_lse, bool[] wanted, {_INPUTS}, Tensor output, Tensor lse, {_OPTIONS}) "
    "-> Tensor[]",
)
_gradients.register_fake(_backward_fake)


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, *options: Any, packing: Packing | None = None, want_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp, zeros without `want_lse` where no kernel gave it.

    Arguments are those of the implementations, `options` the first nine of `Options`.
    """
    seed = dropout_seed(query, Options(*options).dropout_p)
    where = (None, None, 0, 0) if packing is None else packing
    o = Options(*options)
    tensors = (query, key, value, *(getattr(o, name) for name in _WITH_GRADIENTS))
    watched = sum(needs_grad(tensor) << place for place, tensor in enumerate(tensors))
    result: tuple[Tensor, Tensor] = _attention(query, key, value, *options, seed, *where, want_lse, watched)
    return result
