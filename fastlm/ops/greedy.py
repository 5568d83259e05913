"""The largest output of a linear layer, found without reading most of its weight: csrc/include/fastlm/greedy.h."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.cpu import greedy as kernel
from fastlm.kernels.cpu import linear as linear_kernel
from fastlm.ops.library import tracing
from fastlm.ops.linear import linear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import Implementation, Op, always
from fastlm.reference import greedy as reference
from fastlm.reference.linear import FEW_TOKENS
from fastlm.reference.quantized import KINDS

__all__ = ["Screen", "greedy"]

DIRECTIONS = 32
_SLICE = 2048  # of them, to see how long they take
_CHUNK = 4096  # rows of a weight that are expanded at a time
_APART = 20.0  # what is known of the main directions to 4 bits may count for so many times more than the rest
_STEP = 2.0**-24  # of float32: the largest relative error of one rounding


class Screen:
    """What `greedy` keeps beside a weight: 4.5 bits a weight, and some bytes a row.

    Args:
        weight: [N, K], float32 or of the kinds F32, F16, BF16 and Q8_0, K a multiple of 32. It must not change.
        bias: float32 [N] or None.
        seen: floats [n, K], inputs of the kind to come: their main directions decide how many rows remain. Whatever
            they are, the result is right.

    Attributes:
        counts: int64 [2], rows of the weight that `greedy` computed whole, and its calls, since they were zero.

    Raises:
        ValueError: there is a reason against it (`why_not`), or `seen` is no such tensor.
    """

    @staticmethod
    def why_not(weight: Tensor | QuantizedTensor, bias: Tensor | None) -> str | None:
        """Why there is no screen for a weight and a bias, or None."""
        if native.CPU.module is None:
            return native.CPU.error
        if not weight.is_cpu:
            return f"the weight is on {weight.device}"
        if isinstance(weight, QuantizedTensor):
            if weight.layout != "blocks" or weight.kind in ("Q4_0", "Q4_1"):
                return f"the weight is {weight.kind}, of which a copy in 4 bits is no smaller"
        elif weight.dtype != torch.float32 or not weight.is_contiguous():
            return f"weight is {weight.dtype}{'' if weight.is_contiguous() else ', not contiguous'}"
        if weight.shape[1] == 0 or weight.shape[1] % 32 or weight.shape[0] == 0:
            return f"weight is {list(weight.shape)}, expected columns in blocks of 32"
        if bias is not None and not (bias.is_cpu and bias.dtype == torch.float32 and bias.is_contiguous()):
            return f"bias is {bias.dtype} on {bias.device}"
        return None

    @torch.no_grad()
    def __init__(self, weight: Tensor | QuantizedTensor, bias: Tensor | None, seen: Tensor) -> None:
        reason = self.why_not(weight, bias)
        if reason is not None:
            raise ValueError(f"Screen: {reason}")
        self.weight, self.bias = weight, bias
        self.counts = torch.zeros(2, dtype=torch.int64)
        rows, columns = weight.shape
        seen = seen.float()
        self.basis = _directions(seen)
        along = seen @ self.basis.T
        across = (seen - along @ self.basis).norm(dim=1)
        spread = torch.cat([_APART * along.pow(2).mean(0).sqrt(), across.pow(2).mean().sqrt()[None]]) + 1e-20
        errors = ((along / spread[:-1]).pow(2).sum(1) + (across / spread[-1]).pow(2)).sqrt()
        longest = (seen.norm(dim=1) / errors.clamp(min=1e-20)).median() + 1e-20
        self.inverses = 1 / torch.cat([spread, longest[None]])
        spread, factor = 1.0000002 / self.inverses[:-1].double(), 1.0000002 / float(self.inverses[-1])
        frobenius = 1.0001 * float(self.basis.double().norm()) + 2.0**-60
        heights = self.basis.double().norm(dim=1)
        rounding = columns * _STEP * float((spread[:-1] * heights).norm())
        share = 2.0**-12 + (2 * (columns + DIRECTIONS) + 256) * _STEP
        data = torch.empty(rows, (columns + DIRECTIONS) // 32 * 18, dtype=torch.uint8)
        slack, most = torch.empty(rows, dtype=torch.float64), 0.0
        for first in range(0, rows, _CHUNK):
            last = min(first + _CHUNK, rows)
            rest = (
                weight.expand_rows(first, last) if isinstance(weight, QuantizedTensor) else weight[first:last].clone()
            )
            reach = _length(rest)
            kernel.coarsen(rest, data[first:last, :-18])
            size = _length(rest)
            products = rest @ self.basis.T
            reach += reach + size + frobenius * _length(products)
            kernel.coarsen(products, data[first:last, -18:])
            off = (products.double() * spread[:-1]).norm(dim=1)
            reach += frobenius * _length(products)  # not less than what is kept of them
            bound = (off.square() + (spread[-1] * size).square()).sqrt() * 1.001 + rounding * size
            slack[first:last] = bound + share * factor * reach
            most = max(most, float(reach.max()))
        if not bool(slack.isfinite().all()) or (bias is not None and not bool(bias.isfinite().all())):
            raise ValueError("Screen: the weight or the bias is not finite")
        self.coarse = linear_kernel.interleave(data, KINDS["Q4_0"].code, rows, columns + DIRECTIONS)
        self.slack = _bfloat_above(slack)
        largest = 0.0 if bias is None else float(bias.abs().max())
        self.limits = (
            (DIRECTIONS + 4) * 2.0**-23 * (1 + frobenius**2),
            2.0**-100 + most * 2.0**-88,
            min(2.0**60, 2.0**100 / max(most, 2.0**-20)) if largest < 2.0**100 else -1.0,
        )

    @staticmethod
    def most_rows(weight: Tensor | QuantizedTensor) -> int:
        """Rows of input for which `greedy` is quicker; integer products of more wait for arithmetic."""
        return 2 if isinstance(weight, QuantizedTensor) and weight.kind == "Q8_0" else 64

    def share(self) -> Screen:
        """The same, with counts of its own."""
        shared = copy.copy(self)
        shared.counts = torch.zeros_like(self.counts)
        return shared

    @staticmethod
    @torch.no_grad()
    def seconds(weight: Tensor | QuantizedTensor, seen: Tensor) -> float:
        """How long making a screen takes on this machine, by that of some of the rows."""
        count, found = min(weight.shape[0], _SLICE), []
        for _ in range(2):  # the first is held up by what is cold
            start = time.perf_counter()
            _directions(seen.float())
            once = time.perf_counter()
            some = weight.expand_rows(0, count) if isinstance(weight, QuantizedTensor) else weight[:count]
            Screen(some, None, seen[:1])
            found.append(once - start + (time.perf_counter() - once) * weight.shape[0] / count)
        return min(found)

    @property
    def nbytes(self) -> int:
        """Bytes beside the weight, which a call reads."""
        return sum(t.nbytes for t in (self.coarse, self.slack, self.basis))

    @property
    def pays(self) -> bool:
        """Whether the calls that were counted have read less than nine tenths of what the products would have.

        Rows here and there come half as fast as all of them in order.
        """
        rows, calls = self.counts.tolist()
        row = self.weight.row_bytes if isinstance(self.weight, QuantizedTensor) else 4 * self.weight.shape[1]
        return bool(2 * rows * row + calls * self.nbytes <= 0.9 * calls * row * len(self.slack))


def _directions(seen: Tensor) -> Tensor:
    """Main directions [DIRECTIONS, K] of the rows of `seen`, orthonormal; zeros where there are no more."""
    found = seen[:: max(1, len(seen) // (2 * DIRECTIONS))].T
    for _ in range(4):
        found = torch.linalg.qr(seen.T @ (seen @ found)).Q
    inner = torch.linalg.svd(seen @ found, full_matrices=False).Vh
    found = (inner @ found.T)[:DIRECTIONS]
    return torch.cat([found, found.new_zeros(DIRECTIONS - len(found), seen.shape[1])]).contiguous()


def _length(rows: Tensor) -> Tensor:
    """A bound of the length of each row [n, K], float64 [n]."""
    return rows.norm(dim=1).double() * (1 + (rows.shape[1] + 64) * 2 * _STEP) + 2.0**-60


def _bfloat_above(values: Tensor) -> Tensor:
    """The least bfloat16 that is not less than each of some positive numbers, its bits as int16."""
    single = (values * 1.0000002).float().view(torch.int32)
    return ((single + 0xFFFF) >> 16).to(torch.int16)


def _cpu_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, screen: Screen | None) -> Tensor:
    assert screen is not None
    tokens, _, refused = _bounded(input, screen)
    if refused >= 0:
        return _reference_run(input, weight, bias, screen)  # which says what is wrong
    return tokens


def _bounded(input: Tensor, screen: Screen) -> tuple[Tensor, Tensor, int]:
    weight = screen.weight
    x = input.reshape(-1, input.shape[-1])
    if isinstance(weight, QuantizedTensor):
        data = weight.data if KINDS[weight.kind].dtype is not None else weight.interleaved()
        code = weight.code
    else:
        data, code = weight, KINDS["F32"].code
    parts = (screen.coarse, screen.slack, screen.basis, screen.inverses)
    tokens, bounds, refused = kernel.greedy(x, data, screen.bias, code, parts, screen.limits, screen.counts)
    return tokens.view(input.shape[:-1]), bounds, refused


def _cpu_why_not(
    input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, screen: Screen | None
) -> str | None:
    if screen is None:
        return "there is no screen"
    if tracing():
        return "torch is tracing, and sees nothing of the kernel"
    if screen.weight is not weight or screen.bias is not bias:
        return "the screen is of another weight"
    if type(input) is not Tensor or input.dtype != torch.float32 or not input.is_contiguous() or not input.is_cpu:
        return f"input is {input.dtype} on {input.device}{'' if input.is_contiguous() else ', not contiguous'}"
    if input.dim() != 3 or input.shape[1] > FEW_TOKENS:
        return "no step of decoding: the product may be by other kernels"
    return None


def _reference_run(
    input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, screen: Screen | None
) -> Tensor:
    return reference.largest(linear(input, weight, bias))


GREEDY = Op(
    "greedy",
    [Implementation("cpu", _cpu_run, _cpu_why_not), Implementation("reference", _reference_run, always)],
)


def greedy(
    input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, *, screen: Screen | None = None
) -> Tensor:
    """The lowest index of the largest of each row of `linear(input, weight, bias)`.

    Args:
        input: [..., K].
        weight, bias: as of `linear`.
        screen: made for them: the same tokens, most of the weight being left alone, for inputs [B, T, K] of a few
            tokens.

    Returns:
        int64 [...].

    Raises:
        BadLogits: a row has NaN, +inf or nothing but -inf among its outputs.
        ValueError: as `linear`.
    """
    tokens: Tensor = GREEDY(input, weight, bias, screen)
    return tokens
