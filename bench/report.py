"""Rows as a table, as a picture against the machine's ceilings, and as the record that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.case import Case
from bench.measure import Comparison

__all__ = ["plot", "rate", "table"]

_HEAD = "| case | shape | ours | peer | against | ratio (middle half) | goal | of the ceiling | memory, ours / peer |"


def rate(case: Case, figure: float) -> str:
    """Seconds or bytes per call, in the unit people think of it in."""
    if case.unit == "bytes":
        return _size(figure)
    if case.unit == "seconds":
        return f"{figure:,.1f} s"
    if case.unit == "calls":
        return f"{figure * 1e6:,.0f} µs"
    return f"{case.work / figure:,.1f} {case.unit}/s"


def ratio(row: dict[str, Any]) -> str:
    """ "1.23× (1.20–1.25)", with as many digits as the ratio deserves."""
    digits = 1 if row["ratio"] >= 10 else 2
    shown = [f"{row[key]:.{digits}f}" for key in ("ratio", "ratio_low", "ratio_high")]
    return f"**{shown[0]}×** ({shown[1]}–{shown[2]})"


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "–"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def line(row: dict[str, Any]) -> str:
    """One row of the table: its figures, or the reason why there are none."""
    start = f"| {row['case']} | {row['shape']} |"
    if row["status"] != "measured":
        return f"{start} **{row['status']}: {row['reason']}** | | {row['against']} | | | | |"
    goal = f"{row['goal']:.2g}×" if row["goal"] else ""
    share = f"{row['ours_of_ceiling']:.0%} of {row['ceiling']}" if "ceiling" in row else ""
    memory = ""
    if row.get("ours_bytes") is not None and row.get("peer_bytes") is not None:
        memory = f"{_size(row['ours_bytes'])} / {_size(row['peer_bytes'])}"
    return (
        f"{start} {row['ours_shown']} | {row['peer_shown']} | {row['against']} | {ratio(row)} | {goal} | "
        f"{share} | {memory} |"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table; rows on which ours loses are as much part of it as the others."""
    return "\n".join([_HEAD, "|---" * (_HEAD.count("|") - 1) + "|", *map(line, rows)])


def figures(case: Case, result: Comparison) -> dict[str, Any]:
    """What a row says besides the times: shown rates, bytes and operations per second."""
    shown: dict[str, Any] = {"ours_shown": rate(case, result.ours), "peer_shown": rate(case, result.peer)}
    for name, total in (("bytes_per_s", case.moved), ("flop_per_s", case.flops)):
        if total is not None:
            shown |= {f"ours_{name}": total / result.ours, f"peer_{name}": total / result.peer}
    if case.moved and case.flops:
        shown["flop_per_byte"] = case.flops / case.moved
    return shown


def plot(record: dict[str, Any], target: Path) -> bool:
    """Draws the roofline: achieved FLOP/s over FLOP per byte of the rows that know both, ours and the peer joined by a
    line, under the machine's ceilings measured in the same run. False, and no file, where no row knows both."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in record["rows"] if row["status"] == "measured" and "flop_per_byte" in row]
    if not rows:
        return False
    reads, flops = record["machine"]["read_bytes_per_s"], record["machine"]["flop_per_s"]
    figure, axes = pyplot.subplots(figsize=(11, 7))
    low = min(row["flop_per_byte"] for row in rows) / 2
    high = max(2 * flops / reads, *(2 * row["flop_per_byte"] for row in rows))
    at = [low, flops / reads, high]
    axes.plot(at, [min(flops, reads * x) / 1e9 for x in at], color="black", label="memory reads, matrix product")
    for number, group in enumerate(sorted({row["group"] for row in rows})):
        colour = f"C{number % 10}"
        mine = [row for row in rows if row["group"] == group]
        for row in mine:
            x, pair = row["flop_per_byte"], (row["peer_flop_per_s"] / 1e9, row["ours_flop_per_s"] / 1e9)
            axes.plot([x, x], pair, color=colour, alpha=0.3, linewidth=1)
        x_values = [row["flop_per_byte"] for row in mine]
        axes.scatter(x_values, [row["ours_flop_per_s"] / 1e9 for row in mine], color=colour, label=f"{group}: ours")
        peers = [row["peer_flop_per_s"] / 1e9 for row in mine]
        axes.scatter(x_values, peers, color=colour, marker="x", label=f"{group}: peer")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be read", ylabel="GFLOP/s")
    machine = record["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}"
    axes.set_title(f"{where}. Above the line: from caches, or in integers")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return True
