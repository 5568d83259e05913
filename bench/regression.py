"""Did a row get worse since the last result of the same machine?"""

from __future__ import annotations

from typing import Any

__all__ = ["machine_key", "regressions"]

# Medians of a few pairs differ by this much between two runs of the same code even where the pairs agree.
_TOLERANCE = 0.03


def machine_key(record: dict[str, Any]) -> str:
    """Results are compared only where processor, instruction-set level and threads are the same."""
    machine = record["machine"]
    return f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads"


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["shape"], row["against"]


def regressions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each row whose ratio fell by more than the spread: the middle halves of both runs don't meet, and the
    median fell by over 3%; and for each that was measured and whose gate is red now. Empty across machines."""
    if machine_key(before) != machine_key(now):
        return []
    old_rows = {_name(row): row for row in before["rows"] if row.get("status") == "measured"}
    lines = []
    for row in now["rows"]:
        old = old_rows.get(_name(row))
        if old is None:
            continue
        where = f"{row['case']}, {row['shape']}, against {row['against']}"
        if row["status"] == "gate failed":
            lines.append(f"{where}: gate failed: {row['reason']}")
        elif row["status"] == "measured":
            apart = row["ratio_high"] < old["ratio_low"]
            if apart and row["ratio"] < (1 - _TOLERANCE) * old["ratio"]:
                lines.append(
                    f"{where}: {row['ratio']:.2f}× ({row['ratio_low']:.2f}–{row['ratio_high']:.2f}), "
                    f"was {old['ratio']:.2f}× ({old['ratio_low']:.2f}–{old['ratio_high']:.2f})"
                )
    return lines
