"""LSTM and GRU with layer normalisation, recurrent dropout and zoneout: a layer in one direction, and its gradients.

Packed sequences and all else as in `fastlm.kernels.cpu.lstm`; there is no projection. The noise is the caller's, so a
result is the reference's for the same noise. An LSTM has two states, h and c, a GRU h alone: which it is follows from
how many are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import lstm, recurrent, recurrent_digits
from fastlm.kernels.cpu.recurrent_digits import bounded, product
from fastlm.kernels.packing import cached, pack

__all__ = ["Saved", "layer_backward", "layer_forward"]

_NAMES = (
    "input", "w_ih", "w_hh", "ln_ih", "ln_hh", "ln_c", "ln_c_bias", "dropout", "zoneout_h", "zoneout_c", "h0", "c0",
    "h0_dropped", "output", "dropped", "activated", "cells", "raw_ih", "raw_hh", "stats",
)  # fmt: skip


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """Those of _NAMES."""
    batch_sizes: Sequence[int]
    reverse: bool


def _pack_gains(ln_ih: Tensor, ln_hh: Tensor, gates: int) -> tuple[Tensor, Tensor]:
    return pack(ln_ih.detach().float()[None], gates=gates), pack(ln_hh.detach().float()[None], gates=gates)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _wide(tensor: Tensor | None) -> Tensor | None:
    """A weight as float32, made once; what is packed of it is then remembered as that of any float32 weight."""
    return tensor if tensor is None or tensor.dtype is torch.float32 else cached("wide", (tensor,), _widen)


def _enough(batch_sizes: Sequence[int]) -> bool:
    """Whether a batch is large enough for digits."""
    return batch_sizes[0] >= 8 and len(batch_sizes) > 1


def _packed(weights: Sequence[Tensor | None], gates: int, digits: bool) -> Any:
    """As the plain layer's, packed once for both."""
    if gates == 4:
        w_ih, w_hh, *biases = weights
        assert w_ih is not None and w_hh is not None
        return cached("lstm digits", weights, lstm.pack_in_digits) if digits else lstm.pack_layer(w_ih, w_hh, *biases)
    return (
        cached("recurrent digits", weights, recurrent.pack_in_digits)
        if digits
        else cached("recurrent", weights, recurrent.pack_layer)
    )


def _variant(given: dict[str, Tensor | None], gates: int) -> tuple[dict[str, Tensor | None], int]:
    """The tensors that make the variant, and how far the rows of shares are apart."""
    dropout, ln_ih, ln_hh = (given[name] for name in ("dropout", "ln_ih", "ln_hh"))
    shares = [given[name] for name in ("zoneout_h", "zoneout_c")]
    tensors: dict[str, Tensor | None] = {"dropout": None if dropout is None else dropout.contiguous()}
    # The same for all rows where expanded, as the expectation is; one stride holds for both.
    same = all(share is None or share.stride(0) == 0 for share in shares)
    for name, share in zip(("zoneout_h", "zoneout_c"), shares, strict=True):
        tensors[name] = None if share is None else (share[0] if same else share).contiguous()
    if ln_ih is not None and ln_hh is not None:
        tensors["ln_ih"], tensors["ln_hh"] = cached("gains", (ln_ih, ln_hh), lambda x, h: _pack_gains(x, h, gates))
    for name in ("ln_c", "ln_c_bias"):
        parameter = given[name]
        tensors[name] = None if parameter is None else parameter.float().contiguous()
    width = next((share.shape[1] for share in shares if share is not None), 0)
    return tensors, 0 if same else width


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def layer_forward(
    input: Tensor,
    batch_sizes: Sequence[int],
    weights: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
    *states: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Any, ...]:
    """One direction of one layer over a packed sequence.

    Args:
        input, batch_sizes, reverse, save: as `lstm.layer_forward`'s.
        weights: w_ih [GH, I], w_hh [GH, H], b_ih and b_hh [GH] or None; G is 4 of an LSTM, 3 of a GRU.
        norms: the gains ln_ih and ln_hh [GH] and, of an LSTM, ln_c [H], or None for all, and ln_c_bias [H] or None.
        noise: the mask [B, H] and the shares of h and, of an LSTM, of c [N, H], each or None.
        states: h0 and, of an LSTM, c0 [B, H].

    Returns:
        output [N, H], the final states [B, H], and what to give to `layer_backward` (None without `save`).

    Raises:
        ValueError: `batch_sizes` is empty, or its sizes are not those of a packed sequence of N rows. Other shapes are
            the caller's to check.
    """
    module = native.CPU.require()
    gates = 2 + len(states)
    rows, inputs = input.shape
    batch, hidden = states[0].shape
    w_ih, w_hh, *_ = weights
    wide = [_wide(weight) for weight in weights]
    assert wide[0] is not None and wide[1] is not None
    digits = _enough(batch_sizes) and recurrent_digits.in_digits(wide[0], wide[1])
    packed = _packed(wide, gates, digits)
    tensors: dict[str, Tensor | None] = dict.fromkeys(_NAMES)
    tensors |= {"input": input.contiguous(), "w_ih": w_ih, "w_hh": w_hh}
    tensors |= zip(("h0", "c0"), (state.contiguous() for state in states), strict=False)
    tensors |= zip(("ln_ih", "ln_hh", "ln_c", "ln_c_bias"), norms, strict=False)
    tensors |= zip(("dropout", "zoneout_h", "zoneout_c"), noise, strict=False)
    variant, stride = _variant(tensors, gates)
    h0, mask = tensors["h0"], variant["dropout"]
    assert h0 is not None
    tensors["h0_dropped"] = h0 if mask is None else h0 * mask
    tensors["output"] = output = input.new_empty(rows, hidden)
    tensors["dropped"] = None if mask is None else input.new_empty(rows, hidden)
    if save:
        lanes = module.simd_lanes()
        panels = -(-hidden // lanes)
        tensors["activated"] = native.empty(panels, rows, 4, lanes)
        tensors["cells"] = native.empty(rows, hidden) if gates == 4 else None
        if norms[0] is not None:
            tensors["raw_ih"] = native.empty(panels, rows, gates, lanes)
            tensors["raw_hh"] = native.empty(panels, rows, gates, lanes)
            tensors["stats"] = input.new_empty(2 * gates - 2, rows)
    final = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]
    given: dict[str, Tensor | None]
    given = dict(zip(("w_ih", "w_hh", "bias"), packed, strict=False)) | dict(zip(("h_n", "c_n"), final, strict=False))
    if digits and (x := tensors["input"]) is not None:
        normed = norms[0] is not None
        given["w_ih_parts"] = recurrent_digits.parts_of_inputs(
            x, wide[0], packed.w_ih, gates, save=save, normalised=normed
        )
    module.variant_forward(
        gates,
        batch_sizes,
        rows,
        batch,
        inputs,
        hidden,
        reverse,
        stride,
        _addresses({**tensors, **variant, **given}),
        native.num_threads(),
        digits,
    )
    saved = Saved(tuple(tensors.values()), batch_sizes, reverse) if save else None
    return output, *final, saved


def layer_backward(saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of `layer_forward`, given those of output and the final states (None: zero). Deterministic.

    Args:
        saved: from `layer_forward`.
        grads: [N, H], and [B, H] for each state.
        needs: which of the results to compute, in their order.

    Returns:
        Those of input, w_ih, w_hh, b_ih, b_hh, then of `norms` and of `states`, in their order.
    """
    module = native.CPU.require()
    given = dict(zip(_NAMES, saved.tensors, strict=True))
    gates = 1 + len(grads)
    input, w_ih, w_hh, h0, activated = (given[name] for name in ("input", "w_ih", "w_hh", "h0", "activated"))
    assert input is not None and w_ih is not None and w_hh is not None and h0 is not None and activated is not None
    if activated.shape[-1] != module.simd_lanes():
        raise RuntimeError("the instruction-set level has changed since the forward pass")
    rows, (batch, hidden) = input.shape[0], h0.shape
    wide_ih, wide_hh = _wide(w_ih), _wide(w_hh)
    assert wide_ih is not None and wide_hh is not None
    digits = _enough(saved.batch_sizes) and recurrent_digits.gradients_in_digits(wide_ih, wide_hh)
    in_which = recurrent_digits.columns_in_digits(gates) if digits else recurrent_digits.pack_columns
    variant, stride = _variant(given, gates)
    norm = given["ln_ih"] is not None
    of_x = native.empty(rows, gates * hidden)
    of_raw = native.empty(rows, gates * hidden) if norm or gates == 3 else of_x
    previous = input.new_empty(rows, hidden) if needs[2] else None
    of_states = [torch.empty_like(h0) for _ in grads[1:]]
    sizes = {"grad_bias": 4 * hidden, "grad_ln_ih": gates * hidden, "grad_ln_hh": gates * hidden}
    sizes |= {"grad_ln_c": hidden, "grad_ln_c_bias": hidden} if gates == 4 else {}
    of_norms = {name: input.new_empty(size) for name, size in sizes.items()} if norm else {}
    tensors: dict[str, Tensor | None] = {
        **{name: t for name, t in given.items() if name not in ("input", "w_ih")},
        **variant,
        **of_norms,
        "w_hh": cached("columns of digits" if digits else "columns", (wide_hh,), in_which),
        "grad_gates": of_x,
        "grad_raw_hh": None if of_raw is of_x else of_raw,
        "previous": previous,
    }
    incoming = [None if grad is None else grad.contiguous() for grad in grads]
    tensors |= zip(("grad_output", "grad_h_n", "grad_c_n"), incoming, strict=False)
    tensors |= zip(("grad_h0", "grad_c0"), of_states, strict=False)
    module.variant_backward(
        gates,
        saved.batch_sizes,
        rows,
        batch,
        hidden,
        saved.reverse,
        stride,
        _addresses(tensors),
        native.num_threads(),
        digits,
    )
    bias = of_norms.get("grad_bias")
    if bias is None and (needs[3] or needs[4]):
        bias = of_x.sum(0) if gates == 4 else torch.cat([of_x.sum(0), of_raw[:, 2 * hidden :].sum(0)])
    of_b_ih = of_b_hh = None
    if bias is not None:  # of a GRU n's two apart, behind r's and z's
        of_b_ih = bias[: gates * hidden]
        of_b_hh = of_b_ih.clone() if gates == 4 else torch.cat([bias[: 2 * hidden], bias[3 * hidden :]])
    of_gains = [of_norms.get(name) for name in ("grad_ln_ih", "grad_ln_hh", "grad_ln_c", "grad_ln_c_bias")]
    results = (
        product(of_x, wide_ih) if needs[0] else None,
        product(of_x.t(), input) if needs[1] else None,
        None if previous is None else product(of_raw.t(), previous, digits=bounded(h0)),
        of_b_ih,
        of_b_hh,
        *of_gains[: 2 * gates - 4],
        *of_states,
    )
    return tuple(result if need else None for result, need in zip(results, needs, strict=True))
