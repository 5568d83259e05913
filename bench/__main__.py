"""`python -m bench cpu`: ours and the peers on the same weights and tokens, turn by turn, correctness first.
`python -m bench gpu`: the same on a GPU. `python -m bench gpu-static`: GPU kernels as compiled, without one.

Exit code 0: all gates green. 1: a gate is red, so that row has no figure. 2: a row's ratio fell since the last result
of this machine. 3: there is no GPU. A peer that is not installed, or crashes, is a row that says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import measure, regression, report
from bench.case import Case, GateFailed
from bench.worker import OURS, EngineError, Task
from fastlm.cli.info import collect

# Modules of bench/cases, in the order they run. Long ones are asked for with --long.
_SUITES: dict[str, tuple[str, ...]] = {
    "first": ("lstm_step", "sampling", "decode"),
    "lstm": ("lstm_step", "lstm", "lstm_variants"),
    "cpu": (
        "decode",
        "batch",
        "prefill",
        "gpt2",
        "sampling",
        "attention",
        "attention_decode",
        "lstm_step",
        "lstm",
        "lookup",
        "dropin",
        "training_memory",
    ),
    "gpu": ("gpu_attention", "gpu_attention_decode", "gpu_recurrent", "gpu_sampling", "gpu_fused", "gpu_generate"),
}
_LONG = {"cpu": ("compiled", "nanogpt")}
_PEERS = {"gpu": ("triton", "flash-attn", "flashinfer-python", "liger-kernel")}
_CPU_PEERS = ("llama_cpp_python", "ctranslate2")
_QUICK_PAIRS = 3
# Threads of an engine in another process spin on for some milliseconds after its turn (GCC's OpenMP: about 10).
_SETTLE = 0.03


def run_case(case: Case, *, quick: bool = False) -> dict[str, Any]:
    """The row: figures where the gate is green and the peer ran, else the reason why there are none."""
    row: dict[str, Any] = {"case": case.name, "shape": case.shape, "against": case.peer_name, "goal": case.goal}
    if case.note:
        row["note"] = case.note
    pairs = min(case.pairs, _QUICK_PAIRS) if quick else case.pairs
    try:
        row["gate"] = case.gate() or "passed"
        if case.settle is not None:
            case, row["note"] = _settled(case, case.settle())
        reads = _reads(case)
        if case.returns_figure:
            result = measure.compare_figures(case.ours, case.peer, pairs=pairs)
        else:
            result, facts = _timed(case, pairs)
            row |= facts
    except GateFailed as error:
        return row | {"status": "gate failed", "reason": str(error)}
    except EngineError as error:
        # Ours that crashes is a failure; a peer that does is a fact.
        return row | {"status": "gate failed" if error.engine == OURS else "peer unavailable", "reason": str(error)}
    row |= {"status": "measured"} | asdict(result) | report.figures(case, result)
    return row | _bound(case, result.ours, reads)


def _settled(case: Case, found: tuple[int, str]) -> tuple[Case, str]:
    """The case less the bytes that are not read any more, and its note with what is to be said of it."""
    spared, said = found
    if case.moved is not None and case.resident is not None:
        less = case.resident - spared
        case = replace(case, moved=case.moved * less / case.resident, resident=less)
    return case, f"{case.note}; {said}" if case.note else said


def _timed(case: Case, pairs: int) -> tuple[measure.Comparison, dict[str, Any]]:
    """The comparison, and what else is known of both sides: of an engine the most memory that its process held in its
    turns, and what it says of itself; of a call in this process the memory it took above what was held before."""
    sides = {"ours": case.ours, "peer": case.peer}
    tasks = {name: side for name, side in sides.items() if isinstance(side, Task)}
    if not tasks:
        device = torch.device(case.device)
        wait = measure.waiter(device)
        result = measure.compare(case.ours, case.peer, pairs=pairs, seconds=case.seconds, wait=wait)
        grown = measure.grown_bytes if wait is None else functools.partial(measure.device_peak, device=device)
        return result, {f"{name}_bytes": grown(side) for name, side in sides.items()}
    known = {name: task.forget_peak() for name, task in tasks.items()}
    # A turn is one call: these take long enough.
    result = measure.compare(case.ours, case.peer, pairs=pairs, seconds=0, settle=_SETTLE)
    facts: dict[str, Any] = {f"{name}_about": task.about() for name, task in tasks.items()}
    return result, facts | {f"{name}_bytes": task.peak_bytes() if known[name] else None for name, task in tasks.items()}


def _reads(case: Case) -> float:
    if case.moved is None:
        return 0.0
    if case.device != "cpu":
        return _device_ceilings(case.device)["read_bytes_per_s"]
    return measure.read_bandwidth(case.resident or case.moved)


def _bound(case: Case, seconds: float, reads: float) -> dict[str, Any]:
    """What the machine would need at least, reading as fast as it read that many bytes before the turns (`reads`) or
    after them, and multiplying as fast as torch's float32 matrix product; and how near ours is to it."""
    if case.moved is None:
        return {}
    reads = max(reads, _reads(case))
    if case.device != "cpu":
        product, rate = "bf16 matmul", _device_ceilings(case.device)["flop_per_s"]
    else:
        product, rate = "sgemm", _flop_per_s()
    needed = {"reads": case.moved / reads, product: (case.flops or 0.0) / rate}
    ceiling = max(needed, key=lambda name: needed[name])
    return {"reads_of_this_size_per_s": reads, "ceiling": ceiling, "ours_of_ceiling": needed[ceiling] / seconds}


@functools.cache
def _device_ceilings(device: str) -> dict[str, float]:
    return measure.device_ceilings(torch.device(device))


@functools.cache
def _flop_per_s() -> float:
    return measure.matmul_rate()


def _rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    suite = arguments.suite
    modules = _SUITES[suite] + (_LONG.get(suite, ()) if arguments.long else ())
    if arguments.only and arguments.only not in modules:
        raise SystemExit(f"--only: {arguments.only!r}, expected one of {', '.join(modules)} (or --long is missing)")
    for module in [arguments.only] if arguments.only else modules:
        command = f"python -m bench {suite} --only {module} --threads {torch.get_num_threads()}"
        for case in importlib.import_module(f"bench.cases.{module}").cases():
            start = time.perf_counter()
            row = run_case(case, quick=arguments.quick) | {"group": module, "command": command}
            yield row | {"took_s": round(time.perf_counter() - start, 1)}


def _machine(suite: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on, with the ceilings measured in this run."""
    if suite != "gpu":
        ceilings = {"read_bytes_per_s": measure.read_bandwidth(), "flop_per_s": _flop_per_s()}
        return facts["machine"] | {"isa": facts["isa"]["active"]} | ceilings
    major, minor = torch.cuda.get_device_capability()
    gpu = {"processor": torch.cuda.get_device_name(), "isa": f"sm_{major}{minor}", "cuda": torch.version.cuda}
    return facts["machine"] | gpu | _device_ceilings("cuda")


def _record(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    facts = collect()
    versions = dict(facts["versions"])
    for package in _PEERS.get(suite, _CPU_PEERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": _machine(suite, facts),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "KMP_"))},
        "rows": rows,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=sorted(_SUITES), help="which cases to run")
    parser.add_argument("--only", metavar="GROUP", help="only the cases of this file of bench/cases, e.g. sampling")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_PAIRS} pairs a row")
    parser.add_argument("--long", action="store_true", help="cases of many minutes too")
    parser.add_argument("--threads", type=int, help="threads of ours and of every peer; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    return parser.parse_args()


def main() -> int:
    """Runs a suite; returns the exit code."""
    if sys.argv[1:2] == ["gpu-static"]:
        from bench.gpu import static

        return static.main(sys.argv[2:])
    arguments = _parse()
    if arguments.suite == "gpu" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"bench gpu: torch {torch.__version__} ({built}) finds no GPU here, so there is nothing to measure. "
            "`python -m bench gpu-static` reports on the kernels without one.",
            file=sys.stderr,
        )
        return 3
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for row in _rows(arguments):
        rows.append(row)
        print(report.line(row), flush=True)
    record = _record(arguments.suite, rows)
    machine = record["machine"]
    # A part of the suite, or a quick one, is a result of its own: it never replaces that of a full run.
    part = "".join(f"-{word}" for word in (arguments.only, "quick" * arguments.quick) if word)
    stem = f"{arguments.suite}-{platform.machine()}-{machine['isa']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{stem}{part}.json"
    last = target if target.exists() else arguments.out / f"{stem}.json"
    worse = regression.regressions(json.loads(last.read_text(encoding="utf-8")), record) if last.exists() else []
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written = [target]
    if report.plot(record, target.with_suffix(".png")):
        written.append(target.with_suffix(".png"))
    print(f"\n{report.table(rows)}\n")
    print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}, reads "
        f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s, products {machine['flop_per_s'] / 1e9:.0f} GFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f". {time.perf_counter() - start:.0f} s. Written: {', '.join(map(str, written))}"
    )
    for text in worse:
        print(f"WORSE than the last result ({last.name}): {text}")
    if any(row["status"] == "gate failed" for row in rows):
        return 1
    return 2 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
