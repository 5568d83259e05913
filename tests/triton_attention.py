"""What the tests of the Triton attention share: cases of all its options, and the judgement of a result."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from tolerance import assert_close_to_reference
from torch import Tensor

from fastlm.ops import attention_kernels
from fastlm.reference import attention as reference
from fastlm.reference.attention import Options, Packing
from fastlm.reference.philox import philox4x32

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "kv_heads": (4, 2, 1),  # of 4 heads
    "lengths": ((32, 32), (37, 51), (51, 37), (1, 40), (3, 65), (70, 70)),
    "dims": ((16, 16), (24, 40), (80, 16)),
    "causal": (False, True),
    "top_left": (False, True),
    "window": (None, 1, 20, 45),
    "softcap": (None, 2.0),
    "alibi": (0, 1, 2),  # slopes: none, [H], [B, H]
    "mask": ("none", "bool", "additive"),
    "dropout_p": (0.0, 0.3),
    "sinks": (False, True),
    "layout": ("contiguous", "strided", "packed"),
}


def pairwise(factors: dict[str, tuple[Any, ...]], possible: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Few cases that have between them every possible pair of values of any two factors: greedily, the best of some."""
    draw = random.Random(seed)
    names = list(factors)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
        if possible({a: factors[a][x], b: factors[b][y]})
    }
    cases = []
    while pairs:
        best: tuple[set[Any], dict[str, int]] = (set(), {})
        wanted = sorted(pairs)
        for _ in range(60):
            a, x, b, y = draw.choice(wanted)
            case = {name: draw.randrange(len(values)) for name, values in factors.items()} | {a: x, b: y}
            if not possible({name: factors[name][index] for name, index in case.items()}):
                continue
            found = {pair for pair in pairs if case[pair[0]] == pair[1] and case[pair[2]] == pair[3]}
            if len(found) > len(best[0]):
                best = found, case
        pairs -= best[0]
        if best[1]:
            cases.append({name: factors[name][index] for name, index in best[1].items()})
    return cases


def possible(case: dict[str, Any]) -> bool:
    """A mask belongs to one batch of equal lengths."""
    return case.get("layout") != "packed" or case.get("mask", "none") == "none"


@dataclass
class Case:
    """Tensors and options of one call, and gradients of its two results."""

    tensors: list[Tensor]  # query, key, value and, if any, sinks
    options: Options
    upstream: list[Tensor] = field(default_factory=list)

    @property
    def sinks(self) -> Tensor | None:
        return self.tensors[3] if len(self.tensors) > 3 else None

    def cast(self, dtype: torch.dtype) -> Case:
        """The same in another dtype and on the CPU. Sinks keep what they are, as they do in training."""
        tensors = [t.detach().cpu().to(dtype) for t in self.tensors]
        tensors[3:] = [t.detach().cpu().to(torch.promote_types(dtype, t.dtype)) for t in self.tensors[3:]]
        options = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in self.options._asdict().items()}
        return Case(tensors, Options(**options), [t.cpu() for t in self.upstream])


def _strided(tensor: Tensor) -> Tensor:
    """A view into NaN, laid out as a projection leaves it: [B, T, H, D] seen as [B, H, T, D]."""
    whole = tensor.new_full((*tensor.transpose(1, 2).shape[:3], tensor.shape[3] + 8), torch.nan)
    view = whole[..., :-8].transpose(1, 2)
    return view.copy_(tensor)


def build(
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    lengths: tuple[int, int] = (37, 51),
    dims: tuple[int, int] = (24, 40),
    causal: bool = False,
    top_left: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    alibi: int = 0,
    mask: str = "none",
    dropout_p: float = 0.0,
    sinks: bool = False,
    layout: str = "contiguous",
) -> Case:
    queries, keys = lengths
    batch = batch if queries * keys < 3000 else 1
    shapes = ((heads, queries, dims[0]), (kv_heads, keys, dims[0]), (kv_heads, keys, dims[1]))
    tensors = [torch.randn(batch, *shape).to(dtype) for shape in shapes]
    packing = None
    if layout == "packed":  # one sequence shorter than the other, and one with no queries
        starts = [[0, length // 3, length // 3, length // 3 + length] for length in lengths]
        starts[1][2] += 5
        starts[1][3] += 5
        tensors = [torch.randn(starts[k][-1], n, d).to(dtype) for k, (n, _, d) in zip((0, 1, 1), shapes, strict=True)]
        packing = Packing(*(torch.tensor(s, dtype=torch.int32, device=device) for s in starts), queries, max(keys, 5))
        batch = 3
    tensors = [t.to(device) for t in tensors]
    if layout == "strided":
        tensors = [_strided(t) for t in tensors]
    if sinks:
        tensors.append(torch.randn(heads, device=device))
    given = None
    if mask == "bool":
        given = torch.rand(batch, 1, queries, keys, device=device) < 0.7
    elif mask == "additive":
        given = torch.randn(heads, 1, keys, device=device).masked_fill(
            torch.rand(heads, 1, keys, device=device) < 0.2, -torch.inf
        )[None]
    slopes = [None, torch.rand(heads, device=device), torch.rand(batch, heads, device=device)][alibi]
    options = Options(
        causal, given, dims[0] ** -0.5, window, softcap, slopes, dropout_p, top_left,
        tensors[3] if sinks else None, None, packing,
    )  # fmt: skip
    case = Case(tensors, options)
    output, lse = formula(case.cast(torch.float64), None)
    case.upstream = [torch.randn(output.shape, device=device), torch.randn(lse.shape, device=device)]
    return case


@functools.cache
def _four_kept(seed: int, b: int, h: int, i: int, four: int, p: float) -> tuple[bool, ...]:
    words = torch.tensor(philox4x32((four, i, h, b), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)))
    words = torch.where(words < 1 << 31, words, 0xFFFFFFFF - words)  # a signed number and its complement
    return tuple((words.float() * 4.6566127342e-10 >= torch.tensor(p)).tolist())


@contextmanager
def dropping(seed: int | None, first_batch: int = 0) -> Iterator[None]:
    """Has the formula drop the weights that a kernel drops; call by call, packed sequences count up."""
    count = itertools.count(first_batch)

    def drop(weights: Tensor, p: float) -> Tensor:
        start = next(count)
        if seed is None or p == 0.0:
            return weights
        shape = weights.shape
        kept = [
            _four_kept(seed, start + b, h, i, j // 4, p)[j % 4]
            for b, h, i, j in itertools.product(*(range(size) for size in shape))
        ]
        return weights * torch.tensor(kept).view(shape) / (1 - p)

    with mock.patch.object(reference.functional, "dropout", drop):
        yield


def formula(case: Case, seed: int | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the reference."""
    o = case.options._replace(sinks=case.sinks)
    query, key, value = case.tensors[:3]
    with dropping(seed):
        if o.packing is not None:
            return reference.attention_varlen(query, key, value, o.packing, *o[:9])
        return reference.attention_lse(query, key, value, *o[:9])


def results(attend: Any, case: Case, *args: Any) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of all tensors."""
    case = Case([t.detach().requires_grad_() for t in case.tensors], case.options, case.upstream)
    output, lse = attend(case, *args)
    # The log-sum-exp of a row that sees nothing is -inf, and has no gradient.
    upstream = [case.upstream[0].to(output.dtype), case.upstream[1].to(lse.dtype).masked_fill(lse == -torch.inf, 0)]
    return [output.detach(), lse.detach(), *torch.autograd.grad([output, lse], case.tensors, upstream)]


def by_kernel(case: Case, seed: int | None) -> tuple[Tensor, Tensor]:
    o = case.options._replace(
        sinks=case.sinks, seed=None if seed is None else torch.tensor([seed], device=case.tensors[0].device)
    )
    return attention_kernels.by_kernel(attention_kernels.TRITON, *case.tensors[:3], o)


def rounded(case: Case, seed: int | None) -> tuple[Tensor, Tensor]:
    """The formula with each product's operands in the tensors' dtype: what a GPU's matrix units are given."""
    dtype = case.tensors[0].dtype

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.to(dtype).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.to(dtype).to(grad.dtype)

    before = reference.torch.softmax

    def softmax(scores: Tensor, dim: int) -> Tensor:
        return Rounded.apply(before(Rounded.apply(scores), dim))

    with mock.patch.object(torch, "softmax", softmax):
        return formula(case, seed)


def compare(case: Case, seed: int | None = None, attend: Any = by_kernel) -> None:
    """The comparison of the suite, which every planted fault must turn red."""
    if case.options.dropout_p == 0.0:
        seed = None
    exact = results(formula, case.cast(torch.float64), seed)
    peer = results(rounded, case.cast(case.tensors[0].dtype), seed)
    found = [t.cpu() for t in results(attend, case, seed)]
    blind = exact[1] == -torch.inf
    assert torch.equal(found[1] == -torch.inf, blind), "queries that see nothing"
    for fast, same, true in zip(found[:2], peer[:2], exact[:2], strict=True):
        some = ~blind if fast.dim() == blind.dim() else slice(None)
        assert_close_to_reference(fast[some], same[some], true[some], floor=5e-6)
    # Where a query sees one key, the gradients of queries and keys are 0 but for rounding: so all as one.
    flat = [torch.cat([t.flatten().double() for t in many[2:]]) for many in (found, peer, exact)]
    assert_close_to_reference(*flat, floor=5e-6)
