"""The n-gram language model: interpolated modified Kneser-Ney smoothing.

Chen & Goodman, 1999, "An empirical study of smoothing techniques for language modeling", section 5: what statistics
alone can do, and so the baseline for everything that is trained.

For an n-gram h w (a history h and a token w), with h' the history without its oldest token:

    P(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + gamma(h) P(w | h')

c is the count at the highest order, and below it the number of distinct tokens seen before the n-gram (its
continuations). D(1), D(2), D(3+) are estimated per order from the counts of counts; gamma(h) is what they set free.
The recursion ends in the uniform distribution. A history never seen is shortened until it has been. Every token has a
positive probability, and they sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NGramLM"]

Ids = np.ndarray | Tensor | Sequence[int]

# Where counts of counts are too few to estimate the discounts from (small vocabularies); KenLM's choice, too.
_FALLBACK = (0.5, 1.0, 1.5)


class NGramLM:
    """Interpolated modified Kneser-Ney of some order over token ids.

    N-grams are kept as a trie in sorted arrays. Level k has an entry for each distinct k-gram: its key is
    (entry of its first k - 1 tokens at the level before) * vocab_size + (its last token), so that looking up many
    n-grams is one binary search a level, and the entries that extend one history lie side by side.

    Args:
        vocab_size: ids are below it.
        order: 1 or more; 5 looks at four tokens before.

    Raises:
        ValueError: `vocab_size` or `order` is below 1.
    """

    def __init__(self, vocab_size: int, order: int = 5) -> None:
        for name, value in (("vocab_size", vocab_size), ("order", order)):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected 1 or more")
        self.vocab_size = vocab_size
        self.order = order
        self._keys: list[np.ndarray] = []  # level k - 1: int64 [entries], sorted
        self._counts: list[np.ndarray] = []  # int64 [entries]: counts at the last level, continuations before it
        self._weights: list[np.ndarray] = []  # float64 [entries]: the discounted count's share
        self._backoff: list[np.ndarray] = []  # float64 [entries of the level before]: gamma

    def fit(self, ids: Ids) -> NGramLM:
        """Counts the n-grams of one stream of tokens, replacing what was fitted before; returns self.

        Memory: about 16 bytes a token and order.

        Raises:
            ValueError: `ids` are empty, not one-dimensional, or not below `vocab_size`.
        """
        tokens = self._checked(ids)
        if not len(tokens):
            raise ValueError("ids: empty, there is nothing to count")
        self._keys, self._counts = [], []
        entry = np.zeros(len(tokens) + 1, np.int64)  # of the (k-1)-gram that starts at each position
        for level in range(1, self.order + 1):
            keys = entry[:-1] * self.vocab_size + tokens[level - 1 :]
            shorter = entry
            kept, first, entry, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if level > 1:  # each distinct k-gram is one continuation of the (k-1)-gram it ends with
                self._counts[-1] = np.bincount(shorter[first + 1], minlength=len(self._keys[-1]))
            self._keys.append(kept)
            self._counts.append(counts)
        self._estimate()
        return self

    def _estimate(self) -> None:
        """The weights and backoffs of every level from its counts."""
        self._weights, self._backoff = [], []
        histories = 1
        for keys, counts in zip(self._keys, self._counts, strict=True):
            discount = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
            history = keys // self.vocab_size
            total = np.bincount(history, counts, histories)
            freed = np.bincount(history, discount, histories)
            seen = total > 0
            self._backoff.append(np.divide(freed, total, out=np.ones(histories), where=seen))
            weights = np.zeros(len(keys))
            np.divide(counts - discount, total[history], out=weights, where=counts > 0)
            self._weights.append(weights)
            histories = len(keys)

    def log_probs(self, ids: Ids) -> np.ndarray:
        """Natural logarithms of each token's probability given those before it, float64 [N].

        The first tokens have shorter histories: the first none.

        Raises:
            ValueError: the model isn't fitted, or `ids` are not below `vocab_size`.
        """
        self._require_fitted()
        tokens = self._checked(ids)
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        history = np.zeros(len(tokens), np.int64)  # entry of the k - 1 tokens before, -1 where there is none
        for keys, weights, backoff in zip(self._keys, self._weights, self._backoff, strict=True):
            known = history >= 0
            entry = np.full(len(tokens), -1)
            entry[known] = _find(keys, history[known] * self.vocab_size + tokens[known])
            probability[known] *= backoff[history[known]]
            probability += np.where(entry >= 0, weights[entry] if len(weights) else 0.0, 0.0)
            history = np.concatenate([[-1], entry[:-1]]) if len(tokens) else entry
        return np.log(probability)

    def logits(self, context: Ids) -> Tensor:
        """Log-probabilities of every token to follow `context` (its last order - 1 tokens count), float32 [vocab_size].

        Raises as `log_probs`.
        """
        self._require_fitted()
        tokens = self._checked(context)
        probability = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for level in range(min(self.order, len(tokens) + 1)):
            entry = 0
            for depth, token in enumerate(tokens[len(tokens) - level :]):
                entry = int(_find(self._keys[depth], np.array([entry * self.vocab_size + token]))[0])
                if entry < 0:
                    break
            if entry < 0:  # then no longer history was seen either
                break
            keys = self._keys[level]
            first, last = np.searchsorted(keys, [entry * self.vocab_size, (entry + 1) * self.vocab_size])
            probability *= self._backoff[level][entry]
            probability[keys[first:last] - entry * self.vocab_size] += self._weights[level][first:last]
        return torch.from_numpy(np.log(probability)).float()

    @property
    def entries(self) -> int:
        """Distinct n-grams of all orders."""
        return sum(map(len, self._keys))

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors. Raises CheckpointError where they can't be written."""
        from fastlm.checkpoints.atomic import save_tensors_atomic, write_json_atomic

        self._require_fitted()
        tensors = {}
        for level, (keys, counts) in enumerate(zip(self._keys, self._counts, strict=True), start=1):
            tensors[f"keys.{level}"] = torch.from_numpy(keys)
            tensors[f"counts.{level}"] = torch.from_numpy(counts)
        folder = Path(folder)
        save_tensors_atomic(folder / "model.safetensors", tensors)
        config = {"architecture": "ngram", "vocab_size": self.vocab_size, "order": self.order}
        write_json_atomic(folder / "config.json", config)

    @classmethod
    def load(cls, folder: str | Path) -> NGramLM:
        """Reads what `save` wrote. Raises CheckpointError where a file is missing, damaged or of something else."""
        import json

        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        from fastlm.checkpoints.errors import CheckpointError

        folder = Path(folder)
        path = folder / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if config["architecture"] != "ngram":
                raise CheckpointError(path, f"architecture {config['architecture']!r}, expected 'ngram'")
            model = cls(config["vocab_size"], config["order"])
            path = folder / "model.safetensors"
            tensors = load_file(path)
            model._keys = [tensors.pop(f"keys.{level}") for level in range(1, model.order + 1)]
            model._counts = [tensors.pop(f"counts.{level}") for level in range(1, model.order + 1)]
        except CheckpointError:
            raise
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(path, f"not an n-gram model: {error}") from error
        histories = 1
        for level, (keys, counts) in enumerate(zip(model._keys, model._counts, strict=True), start=1):
            right = keys.dtype == counts.dtype == np.int64 and keys.ndim == 1 and keys.shape == counts.shape
            if not right or (np.diff(keys) <= 0).any() or (counts < 0).any():
                raise CheckpointError(path, f"keys.{level} and counts.{level} are not int64, sorted and of one length")
            if len(keys) and not (keys[0] >= 0 and keys[-1] < histories * model.vocab_size):
                raise CheckpointError(
                    path, f"keys.{level}: some are beyond the {histories} histories of the level before"
                )
            histories = len(keys)
        model._estimate()
        return model

    def _require_fitted(self) -> None:
        if not self._keys:
            raise ValueError("this n-gram model has not been fitted: call fit(ids) first")

    def _checked(self, ids: Ids) -> np.ndarray:
        tokens = np.asarray(ids, np.int64)
        if tokens.ndim != 1:
            raise ValueError(f"ids: shape {list(tokens.shape)}, expected one dimension")
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(f"ids[{at}]: {tokens[at]}, expected 0 to {self.vocab_size - 1}")
        return tokens

    def __repr__(self) -> str:
        return f"NGramLM(order={self.order}, vocab_size={self.vocab_size}, entries={self.entries:,})"


def _discounts(counts: np.ndarray) -> tuple[float, ...]:
    """D(1), D(2), D(3+) by Chen & Goodman's equation 26, or fixed ones where that has no sensible answer."""
    of = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)  # n1 to n4
    if not of.all():
        return _FALLBACK
    y = of[0] / (of[0] + 2 * of[1])
    found = tuple(float(i - (i + 1) * y * of[i] / of[i - 1]) for i in (1, 2, 3))
    return found if all(0 < d <= i for i, d in enumerate(found, start=1)) else _FALLBACK


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of `wanted` in the sorted `keys`, -1 where absent."""
    if not len(keys):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)
