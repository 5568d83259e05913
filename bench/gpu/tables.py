"""The report of compiled kernels: in the terminal, as Markdown, and against the last one."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from bench.gpu import chips, compiled

__all__ = ["markdown", "regressions", "show", "versions"]

_COLUMNS = (
    "kernel",
    "target",
    "warps",
    "regs",
    "spill",
    "shared",
    "blocks (limit)",
    "matrix",
    "loop",
    "busiest",
    "at most",
    "in turns",
)


def _cells(row: dict[str, Any]) -> list[str]:
    if "registers" not in row:
        return [row["kernel"], row["target"], *[""] * (len(_COLUMNS) - 3), "; ".join(row["problems"])]
    fit, bound, chip = row["occupancy"], row["bound"], chips.CHIPS[row["target"]]
    shared = f"{row['shared'] / 1024:.0f} of {chip.shared_per_block / 1024:.0f} KB" if row["shared"] else "0"
    return [
        row["kernel"],
        row["target"],
        str(row["warps"]),
        str(row["registers"]),
        f"{row['spills']} + {scalar} scalar" if (scalar := row.get("scalar_spills", 0)) else str(row["spills"]),
        shared,
        f"{fit['blocks']} ({fit['limit']})",
        ", ".join(row["matrix"]) or "–",
        str(row["instructions"]),
        bound["unit"],
        f"{bound['share']:.0%} of {bound['of']}",
        f"{bound['in_turns']:.0%}",
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the compact table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, no_wrap=column != "kernel", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row), style="red" if row["problems"] else None)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    head = [*_COLUMNS, "instructions of a turn, by pipe", "cycles of a turn, by unit"]
    lines = [
        "# GPU kernels as compiled, without a GPU",
        "",
        "`python -m bench gpu-static`. " + ", ".join(f"{name} {text}" for name, text in record["tools"].items()) + ".",
        "",
        "One turn of a block's main loop (the one with the matrix products, or else with the loads from memory) keeps",
        "each unit busy for so many cycles at the published rates below. *At most*: the share of the peak rate of",
        "matrix products, or of the memory's bandwidth, where all units work at once and the busiest never waits; *in",
        "turns*: where products (or memory) and all the rest take turns, as in a block whose warps run in step. A",
        "kernel that hides its latencies runs between the two.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in record["rows"]:
        cells = _cells(row)
        if "bound" in row:
            pipes = ", ".join(f"{name} {number}" for name, number in row["pipes"].items())
            cycles = ", ".join(f"{name} {number:,.0f}" for name, number in row["bound"]["cycles"].items())
            cells += [pipes, cycles]
        if row["problems"]:
            cells[0] += f" **{'; '.join(row['problems'])}**"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Per clock and multiprocessor (lanes, instructions of warps, bytes):", ""]
    lines += [
        "| target | chip | matrix FLOP | FMA | ALU | special | issue | shared | L2 | memory | source |",
        "|---" * 11 + "|",
    ]
    for target, chip in chips.CHIPS.items():
        figures = (chip.matrix_flops, chip.ffma, chip.alu, chip.special, chip.issue, chip.shared_bytes, chip.l2_bytes)
        lines.append(
            f"| {target} | {chip.chip} | {' | '.join(map(str, figures))} | {chip.dram_bytes:.1f} | {chip.source} |"
        )
    return "\n".join(lines) + "\n"


def regressions(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel that is worse than it was: more spills of either kind, fewer blocks, a bound lower by over
    2 points, 3% more instructions in the loop, or another matrix instruction."""
    old_rows = {(row["kernel"], row["target"]): row for row in before if "bound" in row}
    lines = []
    for row in now:
        old = old_rows.get((row["kernel"], row["target"]))
        if old is None or "bound" not in row:
            continue
        where = f"{row['kernel']}, {row['target']}"
        for what, was, is_now, is_worse in (
            ("spilled bytes", old["spills"], row["spills"], row["spills"] > old["spills"]),
            ("scalar spills", *_both(old, row, "scalar_spills"), _more(old, row, "scalar_spills")),
            (
                "blocks",
                *_pair(old, row, "occupancy", "blocks"),
                row["occupancy"]["blocks"] < old["occupancy"]["blocks"],
            ),
            ("share of peak", *_pair(old, row, "bound", "share"), row["bound"]["share"] < old["bound"]["share"] - 0.02),
            (
                "instructions",
                old["instructions"],
                row["instructions"],
                row["instructions"] > 1.03 * old["instructions"],
            ),
            ("matrix instruction", old["matrix"], row["matrix"], not set(old["matrix"]) <= set(row["matrix"])),
        ):
            if is_worse:
                lines.append(f"{where}: {what} {_short(is_now)}, was {_short(was)}")
    return lines


def _both(old: dict[str, Any], new: dict[str, Any], name: str) -> tuple[int, int]:
    """Of records that may be older than the figure."""
    return old.get(name, new[name]), new[name]


def _more(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    was, now = _both(old, new, name)
    return now > was


def _pair(old: dict[str, Any], new: dict[str, Any], part: str, name: str) -> tuple[Any, Any]:
    return old[part][name], new[part][name]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Of the compilers whose output is reported."""
    import triton

    found = {"Triton": triton.__version__}
    for name in ("ptxas-blackwell", "nvcc"):
        try:
            text = subprocess.run([compiled.tool(name), "--version"], capture_output=True, text=True, check=True).stdout
            match = re.search(r"V(\d[\d.]+)", text)
            found[name] = match[1] if match else "unknown"
        except FileNotFoundError:
            found[name] = "not found"
    return found
