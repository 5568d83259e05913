"""`python -m bench first`: the first figures, ours against what a user has today."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, GateFailed
from bench.measure import compare, read_bandwidth
from fastlm.cli.info import collect

_SUITES = {"first": ("lstm_step", "sampling", "decode")}


def _rate(case: Case, seconds: float) -> str:
    if case.unit == "calls":
        return f"{seconds * 1e6:,.0f} µs"
    return f"{case.work / seconds:,.1f} {case.unit}/s"


def _run_case(case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "shape": case.shape, "against": case.peer_name, "goal": case.goal}
    try:
        case.gate()
    except GateFailed as error:
        return row | {"gate": str(error)}
    result = compare(case.ours, case.peer, pairs=case.pairs, seconds=case.seconds)
    shown = {"ours_shown": _rate(case, result.ours), "peer_shown": _rate(case, result.peer)}
    return row | {"gate": "passed"} | asdict(result) | shown


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | shape | ours | peer | against | ratio (middle half) | goal |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['case']} | {row['shape']} |"
        if row["gate"] != "passed":
            lines.append(f"{start} **gate failed: {row['gate']}** | | {row['against']} | | |")
            continue
        goal = f"{row['goal']:.0f}×" if row["goal"] else ""
        ratio = f"**{row['ratio']:.1f}×** ({row['ratio_low']:.1f}–{row['ratio_high']:.1f})"
        lines.append(f"{start} {row['ours_shown']} | {row['peer_shown']} | {row['against']} | {ratio} | {goal} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=sorted(_SUITES), help="which cases to run")
    parser.add_argument("--only", help="run only the cases of this file, e.g. sampling")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in _SUITES[arguments.suite]:
        if arguments.only and name != arguments.only:
            continue
        for case in importlib.import_module(f"bench.cases.{name}").cases():
            rows.append(_run_case(case))
            print(_table(rows[-1:]).splitlines()[-1], flush=True)
    facts = collect()
    record = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": facts["versions"],
        "machine": facts["machine"] | {"isa": facts["isa"]["active"], "read_bytes_per_s": read_bandwidth()},
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{arguments.suite}-{platform.machine()}-{facts['isa']['active']}.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    machine = record["machine"]
    print(f"\n{_table(rows)}\n")
    print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}, reads "
        f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s; torch {facts['versions']['torch']}, transformers "
        f"{facts['versions']['transformers']}. Written to {target}"
    )
    return 0 if all(row["gate"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
