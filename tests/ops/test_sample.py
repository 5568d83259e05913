"""`fastlm.ops.sample`: the same tokens from every backend, and the right distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chi_square import ACTIVE, combinations, exact_distribution, p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops
from fastlm.kernels import native
from fastlm.reference.philox import random64
from fastlm.reference.sample import MOST_TOKENS, processed_logits, relative_probabilities

DRAWS = 20_000
HISTORY = torch.tensor([4, 4, 9, 9, 9, 17, 2, 2, 25, 9])
PROMPT = 3
inf = math.inf

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.error))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def both(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with ops.backend("cpu"):
        fast = ops.sample(logits, **options)
    with ops.backend("reference"):
        return fast, ops.sample(logits, **options)


def levels() -> Iterator[str]:
    """Each instruction-set level in turn: hypothesis does not take the fixture."""
    module = native.CPU.require()
    before = module.isa_active()
    try:
        for level in module.isa_available():
            assert module.isa_force(level)
            yield level
    finally:
        module.isa_force(before)


def case() -> Tensor:
    return torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5


def draws(logits: Tensor, **options: Any) -> Tensor:
    history = HISTORY.expand(DRAWS, -1)
    return ops.sample(logits.expand(DRAWS, -1), history=history, prompt_lengths=PROMPT, **options)


# The distribution


@pytest.mark.parametrize("options", combinations(), ids=lambda options: "+".join(options) or "none")
def test_chi_square(options: dict) -> None:
    expected = exact_distribution(case(), HISTORY, PROMPT, **options)
    assert p_value(draws(case(), seed=11, **options), expected) > 1e-3


@pytest.mark.parametrize("axis", ["seed", "sequence", "position"])
def test_chi_square_along_each_counter(axis: str) -> None:
    expected = exact_distribution(case(), HISTORY, PROMPT, top_p=0.6)
    counters = {"sequence": 5, axis: torch.arange(DRAWS)}
    assert p_value(draws(case(), top_p=0.6, **counters), expected) > 1e-3


def test_successive_draws_are_independent() -> None:
    single = exact_distribution(case(), HISTORY, PROMPT, top_p=0.5)
    pairs = torch.outer(single, single).flatten()

    def joint(position: Tensor) -> Tensor:
        tokens = draws(case(), top_p=0.5, sequence=0, position=position)
        return tokens[0::2] * len(single) + tokens[1::2]

    assert p_value(joint(torch.arange(DRAWS)), pairs) > 1e-3
    assert p_value(joint(torch.arange(DRAWS) // 2), pairs) < 1e-9  # a draw used twice


def _faults() -> dict[str, tuple[dict, dict]]:
    """Name: the options asked for, and options that do what a faulty sampler would make of them."""
    x = case()
    last = exact_distribution(x, HISTORY, PROMPT, top_p=0.8)
    last_kept = int(torch.where(last > 0, last, inf).argmin())
    without_last, with_next = torch.zeros(30), 0.8 + 1e-3
    without_last[last_kept] = -inf
    kept = int((last > 0).sum())
    while int((exact_distribution(x, HISTORY, PROMPT, top_p=with_next) > 0).sum()) == kept:
        with_next += 1e-3
    return {
        "top_p drops a token": ({"top_p": 0.8}, {"top_p": 0.8, "logit_bias": without_last}),
        "top_p keeps one more": ({"top_p": 0.8}, {"top_p": with_next}),
        "top_k keeps one more": ({"top_k": 9}, {"top_k": 10}),
        "top_k keeps one less": ({"top_k": 9}, {"top_k": 8}),
        "min_p ignored": ({"min_p": 0.08}, {}),
        "temperature twice": ({"temperature": 0.7}, {"temperature": 0.49}),
        "repetition twice": ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6**2}),
        "presence twice": ({"presence_penalty": 0.9}, {"presence_penalty": 1.8}),
        "frequency as presence": ({"frequency_penalty": 0.5}, {"presence_penalty": 0.5}),
        "bias ignored": ({"logit_bias": ACTIVE["logit_bias"]}, {}),
    }


@pytest.mark.parametrize(("asked", "done"), _faults().values(), ids=_faults().keys())
def test_faulty_samplers_are_found(asked: dict, done: dict) -> None:
    assert p_value(draws(case(), **done), exact_distribution(case(), HISTORY, PROMPT, **asked)) < 1e-9


@needs_native
def test_large_flat_vocabulary_is_drawn_evenly() -> None:
    vocab = 100_003
    tokens = torch.cat([ops.sample(torch.zeros(1, vocab).expand(50, -1), seed=seed) for seed in range(40)])
    assert p_value(tokens * 20 // vocab, torch.full((20,), 0.05, dtype=torch.float64)) > 1e-3


# The same token everywhere


def logits_of(kind: str, batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(batch, vocab, generator=generator)
    if kind == "peaked":
        x[:, vocab // 2] += 30
    elif kind == "flat":
        x = x * 1e-3
    elif kind == "tied":
        x = x.round()
    elif kind == "huge":
        x = x * 1e37
    elif kind == "forbidden":
        x = torch.where(torch.rand(batch, vocab, generator=generator) < 0.9, -inf, x)
        x[:, vocab - 1] = 0.5
    elif kind == "wide":
        x = x * 20
    return x


KINDS = ("normal", "peaked", "flat", "tied", "huge", "forbidden", "wide")


@needs_native
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_native_equals_reference(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 2, 3, 15, 16, 17, 127, 129, 511, 512, 513, 1500]), "vocab")
    batch = data.draw(st.integers(1, 4), "batch")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), "seed"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    x = logits_of(data.draw(st.sampled_from(KINDS), "kind"), batch, vocab, generator)
    if dtype == torch.float16:
        x = x.clamp(min=-6e4, max=6e4)
        x = torch.where(x == -6e4, -inf, x)
        x[:, 0] = 1
    x = x.to(dtype)

    def option(values: list) -> Any:
        if data.draw(st.booleans()):
            return data.draw(st.sampled_from(values))
        return torch.tensor([data.draw(st.sampled_from(values)) for _ in range(batch)])

    options = {
        "temperature": option([1.0, 0.0, 0.3, 0.9, 3.0, 1e-30, 1e30]),
        "top_k": option([0, 1, 2, 40, 400, 5000]),
        "top_p": option([1.0, 0.9, 0.5, 0.01, 1e-30]),
        "min_p": option([0.0, 0.05, 0.5, 1.0, 1e-40]),
        "seed": option([0, 1, -1, 2**62]),
        "position": option([0, 1, 2**32 - 1]),
        "sequence": data.draw(st.sampled_from([None, 0, 2**63])),
    }
    if data.draw(st.booleans(), "bias"):
        options["logit_bias"] = torch.randn(vocab, generator=generator)
    if data.draw(st.booleans(), "history"):
        length = data.draw(st.integers(0, 30))
        options["history"] = torch.randint(0, vocab, (batch, length), generator=generator)
        options["history_lengths"] = option([0, length // 2, length])
        options["prompt_lengths"] = option([0, length // 3, length])
        options["repetition_penalty"] = option([1.0, 1.3, 0.8])
        options["presence_penalty"] = option([0.0, 0.7, -0.3])
        options["frequency_penalty"] = option([0.0, 0.11, 0.4])
    with ops.backend("reference"):
        expected = ops.sample(x, **options)
    with ops.backend("cpu"), threads(data.draw(st.integers(1, 2), "threads")):
        for level in levels():
            assert torch.equal(ops.sample(x, **options), expected), level


@needs_native
def test_thousands_of_draws_at_any_batch_size_and_thread_count(isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for kind in KINDS:
        x = logits_of(kind, 64, 700, generator)
        for position, options in enumerate(({}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.7, "min_p": 0.01})):
            with ops.backend("reference"):
                expected = ops.sample(x, position=position, **options)
            with ops.backend("cpu"):
                for count in (1, 2):
                    with threads(count):
                        assert torch.equal(ops.sample(x, position=position, **options), expected)
                alone = [ops.sample(x[row : row + 1], sequence=row, position=position, **options) for row in range(64)]
            assert torch.equal(torch.cat(alone), expected)


@needs_native
def test_python_threads_do_not_share_scratch() -> None:
    x = torch.randn(1, 5000)
    history = torch.randint(0, 5000, (1, 50))

    def draw(position: int) -> int:
        options = {"top_k": 300 if position % 2 else 0, "history": history, "frequency_penalty": 0.5}
        return int(ops.sample(x, position=position, top_p=0.9, **options))

    expected = [draw(position) for position in range(400)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(400))) == expected


# A last bit that differs would change a token too rarely to be seen in draws. These make it decide.


@needs_native
def test_relative_probabilities_are_the_same_bits(isa: str) -> None:
    x = torch.zeros(2000, 100)
    x[:, 1:] = -4 * torch.rand(2000, 1)
    e = torch.stack([relative_probabilities(row[:2], 0.7)[1] for row in x])
    fast, expected = both(x, temperature=0.7, min_p=e)
    assert torch.equal(fast, expected)
    assert int((fast > 0).sum()) > 1000
    assert not ops.sample(x, temperature=0.7, min_p=torch.nextafter(e, torch.tensor(2.0))).any()


@needs_native
def test_processed_logits_are_the_same_bits(isa: str) -> None:
    x, bias = torch.randn(1000, 1) * 8, torch.randn(1000, 1)
    count = torch.randint(1, 9, (1000,))
    penalties = (1.37, 0.71, 0.11)
    exact = torch.stack(
        [processed_logits(x[b], bias[b], HISTORY.new_zeros(int(n)), 0, penalties) for b, n in enumerate(count)]
    )
    for penalised in (0, 1):  # the lower id wins if and only if both are equal, so both ways round
        logits = torch.where(torch.arange(2) == penalised, x, exact)
        tokens = ops.sample(
            logits,
            temperature=0,
            logit_bias=torch.where(torch.arange(2) == penalised, bias, torch.zeros(1000, 1)),
            history=torch.full((1000, 8), penalised),
            history_lengths=count,
            repetition_penalty=penalties[0],
            presence_penalty=penalties[1],
            frequency_penalty=penalties[2],
        )
        assert not tokens.any()


@needs_native
@pytest.mark.parametrize("top_k", [0, 50, 7000])
def test_real_vocabulary(isa: str, top_k: int) -> None:
    x = torch.randn(3, 50_257) * 3
    fast, expected = both(x, top_k=top_k, top_p=0.95, temperature=0.9)
    assert torch.equal(fast, expected)


@needs_native
def test_largest_vocabulary() -> None:
    """torch.multinomial ends at 2^24. Equal logits: the token is known, and the sum of weights the largest there is."""
    logits = torch.zeros(1, MOST_TOKENS)
    expected = [random64(seed, 0, 0, 0) * MOST_TOKENS >> 64 for seed in range(4)]
    assert max(expected) > 2**24
    with ops.backend("cpu"):
        assert [ops.sample(logits, seed=seed).item() for seed in range(4)] == expected
    with pytest.raises(ValueError, match=f"logits have {MOST_TOKENS + 1} tokens, expected at most"):
        ops.sample(logits.new_zeros(1, 1).expand(1, MOST_TOKENS + 1))


@needs_native
def test_layouts_of_the_logits(isa: str) -> None:
    wide = torch.randn(6, 2 * 333)
    for x in (wide[:, ::2], wide[:, 1::2], wide[::2, 3:], wide.t()[:6], wide[:1].expand(6, -1), wide[:0]):
        bias = torch.randn(2 * x.shape[1])[::2]
        fast, expected = both(x, top_p=0.9, logit_bias=bias)
        assert torch.equal(fast, expected)
        assert torch.equal(fast, ops.sample(x.contiguous(), top_p=0.9, logit_bias=bias.contiguous()))


# Options


def test_temperature_zero_takes_the_lowest_id_of_the_largest() -> None:
    x = torch.tensor([[0.0, 3.0, -inf, 3.0], [5.0, 5.0, 5.0, 5.0], [-0.0, 0.0, -1.0, 0.0]])
    for seed in range(5):
        assert ops.sample(x, temperature=0, seed=seed).tolist() == [1, 0, 0]


def test_ties_at_the_cut_go_to_the_lower_id() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 1.0]]).expand(500, -1)
    assert set(ops.sample(x, top_k=2).tolist()) == {0, 1}
    assert set(ops.sample(x, top_p=0.7).tolist()) == {0, 1, 2}
    assert set(ops.sample(x, min_p=0.3).tolist()) == {0, 1, 2, 3}


def test_rows_have_options_of_their_own() -> None:
    x = torch.randn(4, 100)
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]),
        "top_k": torch.tensor([0, 3, 0, 10]),
        "top_p": torch.tensor([1.0, 1.0, 0.5, 0.9]),
        "seed": torch.tensor([1, 2, 3, 4]),
        "sequence": torch.tensor([9, 8, 7, 6]),
        "position": torch.tensor([0, 100, 5, 7]),
    }
    together = ops.sample(x, **options)
    for row in range(4):
        alone = ops.sample(x[row : row + 1], **{name: value[row].item() for name, value in options.items()})
        assert alone.item() == together[row].item()


def test_bias_as_a_dict_is_the_dense_one() -> None:
    x = torch.randn(64, 50)
    dense = torch.zeros(50)
    dense[7], dense[9] = 3.0, -inf
    tokens = ops.sample(x, logit_bias={7: 3.0, 9: -inf})
    assert torch.equal(tokens, ops.sample(x, logit_bias=dense))
    assert torch.equal(tokens, ops.sample(x, logit_bias=dense.expand(64, -1)))
    assert 9 not in tokens.tolist()


def test_prompt_and_length_bound_what_counts() -> None:
    x = torch.zeros(1, 4)
    history = torch.tensor([[0, 1, 2]])

    def allowed(**options: Any) -> set[int]:
        tokens = ops.sample(x.expand(300, -1), history=history.expand(300, -1), **options)
        return set(tokens.tolist())

    assert allowed(presence_penalty=100.0) == {3}
    assert allowed(presence_penalty=100.0, prompt_lengths=1) == {0, 3}
    assert allowed(frequency_penalty=100.0, history_lengths=2) == {2, 3}
    assert allowed(repetition_penalty=2.0, prompt_lengths=3) == {0, 1, 2, 3}  # 0 / 2 is 0


# Errors


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ([0.0, math.nan, 0.0], {}, "row 1: the logit of token 1 is NaN"),
        ([0.0, -math.nan, 0.0], {"temperature": 0.0}, "row 1: the logit of token 1 is NaN"),
        ([0.0, 0.0, inf], {"top_k": 2}, r"row 1: the logit of token 2 is \+inf"),
        ([-inf, -inf, -inf], {"top_p": 0.5}, "row 1: every logit is -inf"),
        ([0.0, 0.0, 0.0], {"logit_bias": torch.full((3,), -inf)}, "row [01]: every logit is -inf"),
        ([0.0, 3e38, 0.0], {"logit_bias": torch.full((3,), 3e38)}, r"row 1: the logit of token 1 is \+inf"),
    ],
)
def test_rows_that_cannot_be_drawn_from(backend: str, row: list, options: dict, message: str) -> None:
    if backend == "cpu" and native.CPU.module is None:
        pytest.skip(str(native.CPU.error))
    with ops.backend(backend), pytest.raises(ValueError, match=f"sample: {message}"):
        ops.sample(torch.tensor([[0.0, 1.0, 2.0], row]), **options)


@pytest.mark.parametrize("position", [0, 15, 16, 500, 511, 512, 1000])
def test_nan_is_found_anywhere(position: int) -> None:
    x = torch.randn(1, 1001)
    x[0, position] = math.nan
    with pytest.raises(ValueError, match=f"row 0: the logit of token {position} is NaN"):
        ops.sample(x, top_k=5)


@pytest.mark.parametrize("bad", [-1, 8])
def test_history_outside_the_vocabulary(bad: int) -> None:
    x = torch.randn(2, 8)
    history = torch.tensor([[1, 2, 3], [3, bad, 4]])
    with pytest.raises(ValueError, match=f"row 1: history has id {bad}, expected 0 <= id < 8"):
        ops.sample(x, history=history, repetition_penalty=1.2)
    fast = ops.sample(x, history=history, history_lengths=torch.tensor([3, 1]), repetition_penalty=1.2)
    with ops.backend("reference"):  # the refused call left nothing behind
        expected = ops.sample(x, history=history, history_lengths=torch.tensor([3, 1]), repetition_penalty=1.2)
    assert torch.equal(fast, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number >= 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": inf}, "temperature is inf"),
        ({"temperature": torch.tensor([1.0, -2.0])}, "temperature of row 1 is -2.0"),
        ({"temperature": torch.ones(3)}, r"temperature is float32 \[3\] on cpu, expected a number or shape \[2\]"),
        ({"top_p": 0.0}, "top_p is 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1, expected an integer >= 0"),
        ({"top_k": 2.5}, "top_k is 2.5, expected an integer >= 0"),
        ({"top_k": torch.tensor([1.0, 2.0])}, "top_k is float32"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": inf}, "presence_penalty is inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"position": -1}, "position is -1"),
        ({"position": 2**32}, "position is 4294967296"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"logit_bias": {8: 1.0}}, "logit_bias has token 8, expected 0 <= token < 8"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": torch.zeros(7)}, r"logit_bias is float32 \[7\]"),
        ({"history": torch.zeros(3, 1, dtype=torch.int64)}, r"history is int64 \[3, 1\]"),
        ({"history": torch.zeros(2, 1)}, "history is float32"),
        ({"history": torch.zeros(2, 4, dtype=torch.int64), "history_lengths": 5}, "history_lengths is 5"),
        ({"history_lengths": 1}, "history_lengths is given, but history is not"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample: {message}"):
        ops.sample(torch.zeros(2, 8), **options)


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)])
def test_bad_logits_are_named(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="sample: logits is"):
        ops.sample(logits)


def test_an_option_of_another_type() -> None:
    with pytest.raises(TypeError, match="temperature is a str"):
        ops.sample(torch.zeros(1, 3), temperature="hot")  # type: ignore[arg-type]


# The op in PyTorch's eyes


def test_opcheck() -> None:
    numbers = (0.8, 0.9, 0.01, 1.2, 0.1, 0.1)
    options = [torch.tensor(v, dtype=torch.float64) for v in numbers] + [torch.tensor(v) for v in (5, 1, 0, 3)]
    history = torch.randint(0, 20, (2, 6))
    for bias, ids in ((None, None), (torch.randn(2, 20), history)):
        torch.library.opcheck(torch.ops.fastlm.sample, (torch.randn(2, 20), options, bias, ids, None, None))


def test_compiled_draws_the_same() -> None:
    x = torch.randn(3, 40)

    def step(logits: Tensor, position: Tensor) -> Tensor:
        return ops.sample(logits * 2, top_p=0.9, position=position)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    position = torch.tensor([1, 2, 3])
    assert torch.equal(compiled(x, position), step(x, position))


@needs_native
def test_explain() -> None:
    explanation = ops.explain("sample", torch.zeros(1, 8))
    assert explanation.chosen == "cpu"
    reasons = dict(ops.explain("sample", torch.zeros(1, 8, device="meta")).reasons)
    assert reasons["cpu"] == "logits are on meta"
