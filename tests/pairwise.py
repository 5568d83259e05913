"""Covering arrays: few combinations of options in which every two values of two options meet."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(**options: list[Any]) -> list[dict[str, Any]]:
    """Combinations such that each pair of values of different options is in one of them. The same at every call."""
    names = list(options)
    choices = random.Random(0)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(options[names[a]]))
        for j in range(len(options[names[b]]))
    }

    def covers(row: list[int]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
        return {pair for pair in itertools.combinations(enumerate(row), 2) if pair in open_pairs}

    rows = []
    while open_pairs:
        must = min(open_pairs)  # so that every row covers something new
        candidates = []
        for _ in range(30):
            row = [choices.randrange(len(values)) for values in options.values()]
            for place, value in must:
                row[place] = value
            candidates.append(row)
        best = max(candidates, key=lambda row: len(covers(row)))
        open_pairs -= covers(best)
        rows.append({name: options[name][i] for name, i in zip(names, best, strict=True)})
    return rows
