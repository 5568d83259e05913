"""Kneser-Ney against the formulas of Chen & Goodman (1999), written out with dictionaries, and against a hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.checkpoints.errors import CheckpointError
from fastlm.models.ngram import NGramLM, _discounts


class ByTheBook:
    """The definition, slowly: a count a k-gram in a dictionary, and the recursion as it is written."""

    def __init__(self, ids: list[int], vocab: int, order: int) -> None:
        self.vocab, self.order = vocab, order
        grams = [[tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)] for k in range(order + 1)]
        self.counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        self.counts[order].update(grams[order])
        for k in range(1, order):
            self.counts[k].update(gram[1:] for gram in set(grams[k + 1]))
        self.discounts = [self.estimate(counts) for counts in self.counts]

    @staticmethod
    def estimate(counts: Counter[tuple[int, ...]]) -> list[float]:
        n1, n2, n3, n4 = (sum(c == j for c in counts.values()) for j in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        d = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return d if all(0 < d[j] <= j for j in (1, 2, 3)) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, token: int, history: tuple[int, ...]) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        return self.recurse(token, history, len(history) + 1)

    def recurse(self, token: int, history: tuple[int, ...], k: int) -> float:
        if k == 0:
            return 1 / self.vocab
        shorter = self.recurse(token, history[1:], k - 1)
        followers = {gram: c for gram, c in self.counts[k].items() if gram[:-1] == history}
        total = sum(followers.values())
        if not total:
            return shorter
        d = self.discounts[k]
        gamma = sum(d[min(c, 3)] for c in followers.values()) / total
        c = self.counts[k][(*history, token)]
        return max(c - d[min(c, 3)], 0.0) / total + gamma * shorter


def skewed(count: int, vocab: int, seed: int) -> list[int]:
    return (np.random.default_rng(seed).zipf(1.3, count) % vocab).tolist()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "vocab"), [(400, 30), (2000, 12), (3, 5), (1, 4)])
def test_agrees_with_the_formulas(order: int, count: int, vocab: int) -> None:
    ids, unseen = skewed(count, vocab, 1), skewed(60, vocab, 2)
    book = ByTheBook(ids, vocab, order)
    model = NGramLM(vocab, order).fit(ids)
    for stream in (unseen, ids[:40]):
        expected = [math.log(book.probability(token, tuple(stream[:i]))) for i, token in enumerate(stream)]
        np.testing.assert_allclose(model.log_probs(stream), expected, rtol=1e-12)


def test_the_estimated_discounts_are_exercised() -> None:
    """Otherwise the agreement above could be between two fallbacks."""
    ids = skewed(2000, 100, 1)
    assert sum(d != [0.0, 0.5, 1.0, 1.5] for d in ByTheBook(ids, 100, 3).discounts[1:]) >= 2
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] * 1 + [9])
    assert _discounts(counts) == pytest.approx((0.5, 1.25, 2.0))  # Y = 8 / (8 + 8)
    assert _discounts(np.array([1, 1, 2])) == (0.5, 1.0, 1.5)


def test_by_hand() -> None:
    """a b a b a over {a, b, c}, order 2.

    Bigrams: ab 2, ba 2. Continuations: a 1 (after b), b 1 (after a). Counts of counts are too few: D = 0.5, 1, 1.5.
    P1(a) = (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * 1/3 = 5/12 = P1(b);  P1(c) = 1/6.
    P(b | a) = (2 - 1) / 2 + 1/2 * 5/12 = 17/24;  P(a | a) = 1/2 * 5/12 = 5/24;  P(c | a) = 1/12.
    """
    model = NGramLM(3, order=2).fit([0, 1, 0, 1, 0])
    assert model.logits([0]).exp().tolist() == pytest.approx([5 / 24, 17 / 24, 1 / 12])
    assert model.logits([]).exp().tolist() == pytest.approx([5 / 12, 5 / 12, 1 / 6])
    assert model.logits([2]).exp().tolist() == pytest.approx([5 / 12, 5 / 12, 1 / 6])  # c was never seen
    assert np.exp(model.log_probs([0, 1, 2])).tolist() == pytest.approx([5 / 12, 17 / 24, 1 / 12])


@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    context=st.lists(st.integers(0, 6), max_size=6),
    order=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_probabilities_are_positive_and_sum_to_one(ids: list[int], context: list[int], order: int) -> None:
    model = NGramLM(7, order).fit(ids)
    logits = model.logits(context)
    assert logits.shape == (7,)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert float(logits.double().exp().sum()) == pytest.approx(1.0, abs=1e-6)
    for token in range(7):  # and both ways of asking agree
        assert model.log_probs([*context, token])[-1] == pytest.approx(float(logits[token]), abs=1e-5)


def test_sums_to_one_in_double_precision_on_a_large_vocabulary() -> None:
    ids = skewed(20_000, 500, 3)
    model = NGramLM(500, 4).fit(ids)
    for context in (ids[100:103], [499, 498, 497], [*ids[5:7], 499], []):
        stream = [[*context, token] for token in range(500)]
        total = sum(math.exp(model.log_probs(row)[-1]) for row in stream)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_higher_orders_help_where_there_is_structure() -> None:
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(10, 0.1), size=(10, 10))
    ids = [0, 0]
    for draw in rng.random(30_000):
        ids.append(int(min(np.searchsorted(table[ids[-2], ids[-1]].cumsum(), draw), 9)))
    losses = [-NGramLM(10, order).fit(ids[:25_000]).log_probs(ids[25_000:]).mean() for order in (1, 2, 3)]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2
    true = -np.mean([np.log(table[a, b, c]) for a, b, c in zip(ids[25_000:], ids[25_001:], ids[25_002:], strict=False)])
    assert losses[2] == pytest.approx(true, abs=0.05)


def test_accepts_arrays_maps_and_tensors(tmp_path: Path) -> None:
    ids = np.array(skewed(500, 20, 4), np.uint16)
    ids.tofile(tmp_path / "ids")
    expected = NGramLM(20, 3).fit(ids.tolist()).log_probs(ids[:50].tolist())
    for form in (ids, np.memmap(tmp_path / "ids", np.uint16, "r"), torch.from_numpy(ids.astype(np.int64))):
        np.testing.assert_array_equal(NGramLM(20, 3).fit(form).log_probs(form[:50]), expected)


def test_large_vocabularies_do_not_overflow() -> None:
    vocab = 3_000_000
    ids = np.random.default_rng(5).integers(vocab - 50, vocab, 3000)
    small = NGramLM(50, 4).fit(ids - (vocab - 50))
    large = NGramLM(vocab, 4).fit(ids)
    assert [a.tolist() for a in small._counts] == [a.tolist() for a in large._counts]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    ids = skewed(1000, 20, 6)
    model = NGramLM(20, 4).fit(ids)
    model.save(tmp_path / "run")
    loaded = NGramLM.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.log_probs(ids), model.log_probs(ids))
    assert (loaded.order, loaded.vocab_size, loaded.entries) == (4, 20, model.entries)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not an n-gram model"):
        NGramLM.load(tmp_path)
    model = NGramLM(20, 3).fit(skewed(100, 20, 7))
    model.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not an n-gram model"):
        NGramLM.load(tmp_path)
    model._keys[1] = model._keys[1][::-1].copy()
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"keys\.2 and counts\.2 are not int64, sorted"):
        NGramLM.load(tmp_path)
    model._keys[1] = np.sort(model._keys[1]) + 1_000_000
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"keys\.2: some are beyond"):
        NGramLM.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "gpt"}')
    with pytest.raises(CheckpointError, match="architecture 'gpt', expected 'ngram'"):
        NGramLM.load(tmp_path)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="order: 0, expected 1 or more"):
        NGramLM(5, 0)
    with pytest.raises(ValueError, match="ids: empty"):
        NGramLM(5).fit([])
    with pytest.raises(ValueError, match=r"ids\[1\]: 5, expected 0 to 4"):
        NGramLM(5).fit([0, 5])
    with pytest.raises(ValueError, match=r"ids: shape \[1, 2\]"):
        NGramLM(5).fit([[0, 1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"call fit\(ids\) first"):
        NGramLM(5).log_probs([1])
