"""The native LSTM with layer normalisation, recurrent dropout and zoneout: a direction of a layer, and its gradients.

Packed sequences and all else as in `fastlm.kernels.cpu.lstm`; there is no projection. The noise is the caller's, so a
result is the reference's for the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu.lstm import pack_columns, pack_layer, product
from fastlm.kernels.packing import cached, pack

__all__ = ["Saved", "layer_backward", "layer_forward"]


class Saved(NamedTuple):
    """What the backward pass needs. `tensors` can go through `ctx.save_for_backward`."""

    tensors: tuple[Tensor | None, ...]
    """input, w_ih, w_hh, ln_ih, ln_hh, ln_c, ln_c_bias, dropout, zoneout_h, zoneout_c, h0_dropped, c0, output, dropped,
    gates, cells, raw_ih, raw_hh, stats."""
    batch_sizes: Sequence[int]
    reverse: bool


def _pack_gains(ln_ih: Tensor, ln_hh: Tensor) -> tuple[Tensor, Tensor]:
    return pack(ln_ih.detach().float()[None], gates=4), pack(ln_hh.detach().float()[None], gates=4)


def _variant(norms: Sequence[Tensor | None], noise: Sequence[Tensor | None]) -> tuple[dict[str, Tensor | None], int]:
    """The tensors that make the variant, and how far the rows of shares are apart."""
    ln_ih, ln_hh, ln_c, ln_c_bias = norms
    dropout, *shares = noise
    tensors: dict[str, Tensor | None] = {"dropout": None if dropout is None else dropout.contiguous()}
    # The same for all rows where expanded, as the expectation is; one stride holds for both.
    same = all(share is None or share.stride(0) == 0 for share in shares)
    for name, share in zip(("zoneout_h", "zoneout_c"), shares, strict=True):
        tensors[name] = None if share is None else (share[0] if same else share).contiguous()
    if ln_ih is not None and ln_hh is not None and ln_c is not None:
        tensors["ln_ih"], tensors["ln_hh"] = cached("gains", (ln_ih, ln_hh), _pack_gains)
        tensors["ln_c"] = ln_c.float().contiguous()
        tensors["ln_c_bias"] = None if ln_c_bias is None else ln_c_bias.float().contiguous()
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
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """One direction of one layer over a packed sequence.

    Args:
        input, batch_sizes, h0, c0, reverse, save: as `lstm.layer_forward`'s.
        weights: w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H] or None.
        norms: the gains ln_ih and ln_hh [4H], ln_c [H], or None for all; the bias ln_c_bias [H] or None.
        noise: the mask [B, H] and the shares of h and of c [N, H], each or None.

    Returns:
        As `lstm.layer_forward`.
    """
    module = native.CPU.require()
    rows, inputs = input.shape
    batch, hidden = h0.shape
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    packed = pack_layer(w_ih, w_hh, b_ih, b_hh, wide=True)
    input, h0, c0 = input.contiguous(), h0.contiguous(), c0.contiguous()
    variant, stride = _variant(norms, noise)
    mask = variant["dropout"]
    saved: dict[str, Tensor | None] = {
        "h0_dropped": h0 if mask is None else h0 * mask,
        "c0": c0,
        "output": input.new_empty(rows, hidden),
        "dropped": None if mask is None else input.new_empty(rows, hidden),
        **dict.fromkeys(("gates", "cells", "raw_ih", "raw_hh", "stats")),
    }
    if save:
        lanes = module.simd_lanes()
        tiles = (-(-hidden // lanes), rows, 4, lanes)
        saved["gates"], saved["cells"] = native.empty(*tiles), native.empty(rows, hidden)
        if norms[0] is not None:
            saved["raw_ih"], saved["raw_hh"] = native.empty(rows, 4 * hidden), native.empty(*tiles)
            saved["stats"] = input.new_empty(6, rows)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    given = {"input": input, "w_ih": packed.w_ih, "w_hh": packed.w_hh, "bias": packed.bias, "h0": h0}
    module.lstm_variant_forward(
        batch_sizes,
        rows,
        batch,
        inputs,
        hidden,
        reverse,
        stride,
        _addresses({**variant, **given, **saved, "h_n": h_n, "c_n": c_n}),
        native.num_threads(),
    )
    output = saved["output"]
    assert output is not None
    if not save:
        return output, h_n, c_n, None
    tensors = (input, w_ih, w_hh, *norms, *noise, *saved.values())
    return output, h_n, c_n, Saved(tensors, batch_sizes, reverse)


def layer_backward(saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of `layer_forward`, given those of output, h_n and c_n (None: zero). Deterministic.

    Args:
        saved: from `layer_forward`.
        grads: [N, H], [B, H], [B, H].
        needs: which of the results to compute, in their order.

    Returns:
        Those of input, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh, ln_c, ln_c_bias, h0, c0.
    """
    module = native.CPU.require()
    input, w_ih, w_hh, *norms = saved.tensors[:7]
    noise, states = saved.tensors[7:10], saved.tensors[10:]
    names = ("h0_dropped", "c0", "output", "dropped", "gates", "cells", "raw_ih", "raw_hh", "stats")
    forward = dict(zip(names, states, strict=True))
    raw_ih, stats, gates = (forward[name] for name in ("raw_ih", "stats", "gates"))
    h0, c0 = forward["h0_dropped"], forward["c0"]
    assert input is not None and w_ih is not None and w_hh is not None and h0 is not None and c0 is not None
    if gates is None or gates.shape[-1] != module.simd_lanes():
        raise RuntimeError("lstm: the instruction-set level has changed since the forward pass")
    rows, (batch, hidden) = input.shape[0], h0.shape
    variant, stride = _variant(norms, noise)
    norm = norms[0] is not None

    def gates_wide() -> Tensor:
        return native.empty(rows, 4 * hidden)

    grad_gates = gates_wide()
    grad_raw_hh = gates_wide() if norm else grad_gates
    previous = input.new_empty(rows, hidden) if needs[2] else None
    grad_h0, grad_c0 = torch.empty_like(h0), torch.empty_like(c0)
    of_norms = [input.new_empty(size) if norm else None for size in (4 * hidden, hidden, hidden)]
    given = [None if grad is None else grad.contiguous() for grad in grads]
    tensors = {
        **variant,
        **{name: tensor for name, tensor in forward.items() if name != "raw_ih"},
        "w_hh": cached("columns", (w_hh,), pack_columns),
        **dict(zip(("grad_output", "grad_h_n", "grad_c_n"), given, strict=True)),
        "grad_gates": grad_gates,
        "grad_raw_hh": grad_raw_hh if norm else None,
        **dict(zip(("grad_ln_hh", "grad_ln_c", "grad_ln_c_bias"), of_norms, strict=True)),
        "previous": previous,
        "grad_h0": grad_h0,
        "grad_c0": grad_c0,
    }
    module.lstm_variant_backward(
        saved.batch_sizes, rows, batch, hidden, saved.reverse, stride, _addresses(tensors), native.num_threads()
    )
    grad_raw_ih, of_ln_ih = grad_gates, None
    if norms[0] is not None and raw_ih is not None and stats is not None:
        grad_raw_ih, of_ln_ih, _ = torch.ops.aten.native_layer_norm_backward(
            grad_gates,
            raw_ih,
            [4 * hidden],
            stats[0, :, None],
            stats[1, :, None],
            norms[0].float(),
            None,
            [True, True, False],
        )
    of_bias = grad_gates.sum(0) if needs[3] or needs[4] else None
    return (
        product(grad_raw_ih, w_ih.float()) if needs[0] else None,
        product(grad_raw_ih.t(), input) if needs[1] else None,
        None if previous is None else product(grad_raw_hh.t(), previous),
        of_bias if needs[3] else None,
        of_bias.clone() if needs[4] and of_bias is not None else None,
        of_ln_ih if needs[5] else None,
        *(grad if need else None for grad, need in zip(of_norms, needs[6:9], strict=True)),
        grad_h0 if needs[9] else None,
        grad_c0 if needs[10] else None,
    )
