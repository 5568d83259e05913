"""Products of recurrent layers in integers of three digits (csrc/cpu/digits.h): which are, and of what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import matmul
from fastlm.kernels.packing import cached, digit_tiles, pack, pack_digits

__all__ = [
    "bounded",
    "columns_in_digits",
    "gradients_in_digits",
    "in_digits",
    "in_parts",
    "pack_columns",
    "parts_of_inputs",
    "product",
]


def parts_of_inputs(
    input: Tensor, w_ih: Tensor, digits: Tensor, gates: int, *, save: bool, normalised: bool = False
) -> Tensor | None:
    """W_ih as parts (csrc/cpu/amx.h), for rows of inputs whose numbers are too unlike each other for digits.

    None if no row is: before a backward pass, after which the weight will be another, looking takes less time than
    packing.

    Args:
        input, w_ih: [N, I], contiguous; [GH, I].
        digits: w_ih packed as digits, of so many gates, 0 of a plain RNN.
        normalised: the products are.
    """
    module = native.CPU.require()
    rows = input.data_ptr(), *input.shape, digits.data_ptr(), len(w_ih), gates, normalised
    if save and module.inputs_in_digits(*rows, native.num_threads()):
        return None
    return in_parts(w_ih, gates)


def in_parts(w_ih: Tensor, gates: int) -> Tensor:
    """A weight [GH, I] as three bfloat16 a number, packed once."""
    return cached("parts", (w_ih,), _IN_PARTS[gates])


def _pack_parts(w_ih: Tensor, *, gates: int) -> Tensor:
    return pack_digits(w_ih.t(), gates=gates, k_groups=0)


_IN_PARTS = {gates: partial(_pack_parts, gates=gates) for gates in (0, 3, 4)}


def in_digits(w_ih: Tensor, w_hh: Tensor) -> bool:
    """Whether a layer's products with W_hh are those of csrc/cpu/digits.h, on tiles of int8.

    Those with W_ih are then as well, or, of some rows, those of csrc/cpu/amx.h: see `parts_of_inputs`.

    A row's result in digits and in floats differ in their last bits, so this is for the weights, whatever the number
    and lengths of rows: a single step has the bits of a sequence, and reads three bytes a weight instead of four. What
    digits are too coarse for is in floats: a weight far above its row's others.
    """
    return (
        digit_tiles()
        and w_ih.dtype is w_hh.dtype is torch.float32
        and len(w_hh) <= _MOST_DEPTH
        and bool(cached("even", (w_hh,), _evenness) & _EVEN_ROWS)
    )


def gradients_in_digits(w_ih: Tensor, w_hh: Tensor) -> bool:
    """The same of the products of gates' gradients with W_hh, for which its columns have to be even."""
    return in_digits(w_ih, w_hh) and bool(cached("even", (w_hh,), _evenness) & _EVEN_COLUMNS)


_MOST_DEPTH = 40_000  # three products of digits, 2^14 at most, of so many numbers fit the sum's 32 bits


_EVEN_ROWS, _EVEN_COLUMNS = 1, 2


def _evenness(matrix: Tensor) -> int:
    """Which of a matrix's sides are even: where no number is more than 7 times the root mean square of its row, or of
    its column, rounding to 24 bits of the largest keeps as much of the others as a sum of floats does."""
    matrix = matrix.detach().contiguous()
    return int(native.CPU.require().evenness(matrix.data_ptr(), *matrix.shape, native.num_threads()))


def columns_in_digits(gates: int) -> Callable[[Tensor], Tensor]:
    """`pack_columns` for gradients as digits, of so many gates."""
    return _COLUMNS_IN_DIGITS[gates]


_COLUMNS_IN_DIGITS = {gates: partial(pack_digits, k_groups=gates) for gates in (1, 3, 4)}


def pack_columns(weight: Tensor) -> Tensor:
    """A weight as it is, for products with its rows' gradients; float32 of bfloat16."""
    return pack(weight.detach().float())


def bounded(h0: Tensor) -> bool:
    """Whether first states are between -1 and 1, as later ones. Else they would decide the unit of their column of all
    states, most far below 1: with h0 of a normal distribution W_hh's gradient had 5 times the error of torch's."""
    return bool(h0.detach().abs().amax() <= 1)


_WORTH_DIGITS = 256  # rows, and numbers in one, below which packing would take too much of it


def product(left: Tensor, right: Tensor, *, digits: bool = False) -> Tensor:
    """left @ right of float32 matrices, without autograd, in memory that is quick to touch (`native.empty`).

    By `matmul.product` or, where `right` has states, which are between -1 and 1, in `digits`, if there are tiles for
    them: twice as fast as torch's. The transpose of a contiguous `left` is taken as it lies.
    """
    (rows, depth), columns = left.shape, right.shape[1]
    out = native.empty(rows, columns)
    if not digits or min(rows, depth) < _WORTH_DIGITS or not digit_tiles():
        return matmul.product(left.detach(), right.detach(), out=out)
    across = left.stride(0) == 1 and left.stride(1) >= rows
    if not across:
        left = left.contiguous()
    right = right.contiguous()
    native.CPU.require().digit_matmul(
        left.data_ptr(),
        left.stride(1) if across else depth,
        across,
        right.data_ptr(),
        columns,
        out.data_ptr(),
        rows,
        columns,
        depth,
        native.num_threads(),
    )
    return out
