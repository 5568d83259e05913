"""`python -m bench gpu-static`: every shipped kernel compiled for every target, and what its machine code says.

Exit code 0: nothing is wrong. 1: a kernel does not compile, spills, asks for more than the chip has, or lacks a matrix
instruction that it should use. 2: something got worse since the last result. No GPU is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.gpu import bounds, chips, compiled, disassembly, tables
from bench.gpu.compiled import Facts
from fastlm.kernels.triton import shipped as shipping
from fastlm.kernels.triton.shipped import Shipped, Work

__all__ = ["discover", "judge", "main", "row"]

_REPOSITORY = Path(__file__).parents[2]
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
_CUDA_TARGETS = tuple(target for target in shipping.TARGETS if target.startswith("sm_"))


def _modules() -> Iterator[ModuleType]:
    """The modules of Triton kernels that ship configurations."""
    package = importlib.import_module("fastlm.kernels.triton")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "shipped"):
            yield module


def discover() -> Iterator[tuple[str, Shipped]]:
    """Each module's name and its configurations."""
    for module in _modules():
        for shipped in module.shipped():
            yield module.__name__, shipped


@dataclass(frozen=True)
class Job:
    """Something to compile: a Triton configuration by its module and name, or a .cu file."""

    source: str
    name: str
    target: str

    def run(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and facts, from the cache where neither source nor tools have changed; else compiles."""
        if self.source.endswith(".cu"):
            source = _REPOSITORY / self.source
            include = [_REPOSITORY / "csrc" / "include", source.parent]
            key = _hash(self.source, self.target, compiled.tool("nvcc"), *_texts(source, include))
            return _cached(
                key, lambda: [(n, f.to_dict()) for n, f in compiled.compile_cuda(source, include, self.target)]
            )
        (shipped,) = (s for m, s in discover() if (m, s.name) == (self.source, self.name))
        found = _cached(
            _triton_key(shipped, self.target),
            lambda: [(self.name, compiled.compile_triton(shipped, self.target).to_dict())],
        )
        return [(self.name, facts) for _, facts in found]  # the same machine code may have had another name


def _texts(source: Path, include: Sequence[Path]) -> Iterator[str]:
    """A source and, each once, what it includes of ours."""
    left, seen = [source], {source}
    while left:
        text = left.pop().read_text(encoding="utf-8")
        yield text
        for name in _INCLUDE.findall(text):
            found = {path for path in (folder / name for folder in include) if path.exists()} - seen
            seen |= found
            left += sorted(found)


def _hash(*parts: object) -> str:
    own = (Path(module.__file__ or "").read_text(encoding="utf-8") for module in (compiled, disassembly))
    return hashlib.sha256("\0".join(map(str, (*own, *parts))).encode()).hexdigest()


def _triton_key(shipped: Shipped, target: str) -> str:
    import triton

    kernel = shipped.kernel
    while not hasattr(kernel, "cache_key"):
        kernel = kernel.fn
    constants = {name: getattr(value, "cache_key", value) for name, value in sorted(shipped.constants.items())}
    options = (shipped.num_warps, shipped.num_stages, sorted(shipped.divisible_by_16))
    return _hash(triton.__version__, target, kernel.cache_key, sorted(shipped.signature.items()), constants, options)


def _cached(key: str, make: Any) -> list[tuple[str, dict[str, Any]]]:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastlm" / "gpu-static"
    path = folder / f"{key}.json"
    if path.exists():
        return [(name, facts) for name, facts in json.loads(path.read_text(encoding="utf-8"))]
    made: list[tuple[str, dict[str, Any]]] = make()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(made), encoding="utf-8")
    temporary.replace(path)
    return made


def run_job(job: Job) -> list[dict[str, Any]]:
    """The rows of one job: also where it can't be compiled."""
    start = time.perf_counter()
    try:
        found = job.run()
    except Exception as error:  # whatever a compiler raises belongs into the row
        text = (getattr(error, "stderr", "") or str(error) or type(error).__name__).strip()
        name = job.name or job.source
        return [{"kernel": name, "target": job.target, "problems": [f"does not compile: {text.splitlines()[-1]}"]}]
    took = round(time.perf_counter() - start, 1)
    known = None if job.source.endswith(".cu") else next(s for m, s in discover() if s.name == job.name)
    return [row(name, job.target, Facts(**facts), known) | {"took_s": took} for name, facts in found]


def row(name: str, target: str, facts: Facts, shipped: Shipped | None) -> dict[str, Any]:
    """What the report says of one kernel on one target."""
    chip = chips.CHIPS[target]
    fit = chips.occupancy(
        chip, warps=facts.warps, registers=facts.registers, shared=facts.shared, tensor_memory=facts.tensor_memory
    )
    limit = bounds.bound(chip, facts, shipped.work if shipped else _work(name, facts))
    return (
        {"kernel": name, "target": target}
        | facts.to_dict()
        | {"occupancy": asdict(fit), "bound": asdict(limit), "problems": judge(target, facts, shipped, fit.blocks)}
    )


def _work(name: str, facts: Facts) -> Work:
    """Of a kernel in CUDA C++. What a sequence's blocks read in their loop is in shared memory, or was just written by
    others and comes from L2: products bound it, not memory."""
    resident = name.startswith("lstm_sequence")
    return Work(tensor_flops=2.0 * facts.multiply_adds * facts.warps * 32) if resident else Work()


def judge(target: str, facts: Facts, shipped: Shipped | None, blocks: int) -> list[str]:
    """What is wrong with a kernel: nothing of this may ship."""
    chip = chips.CHIPS[target]
    problems = []
    if facts.spills or facts.pipes.get("spill"):
        problems.append(f"spills {facts.spills} bytes a thread")
    if facts.shared > chip.shared_per_block:
        problems.append(f"shared memory of {facts.shared} bytes, above {target}'s {chip.shared_per_block}")
    elif blocks < 1:
        problems.append("not one block fits a multiprocessor")
    wanted = shipped.must_use if shipped else ()
    if chip.matrix in wanted and chip.matrix not in facts.matrix:
        problems.append(f"no {chip.matrix}, but {', '.join(facts.matrix) or 'no matrix instruction'}")
    return problems


def _jobs(only: str | None, targets: Iterable[str], quick: bool) -> list[Job]:
    targets = list(targets)
    kernels = list(discover())
    if quick:
        first: dict[Any, tuple[str, Shipped]] = {}
        for module, s in kernels:
            first.setdefault(s.kernel, (module, s))
        kernels = list(first.values())
    jobs = [Job(module, s.name, target) for module, s in kernels for target in targets if target in s.targets]
    sources = sorted(str(path.relative_to(_REPOSITORY)) for path in (_REPOSITORY / "csrc" / "cuda").glob("*.cu"))
    jobs += [Job(source, "", target) for source in sources for target in targets if target in _CUDA_TARGETS]
    return [job for job in jobs if only is None or only in (job.name or job.source) or only in job.source]


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu-static", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="kernels with this in their name, or of this file")
    parser.add_argument("--target", choices=shipping.TARGETS, action="append", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="of each Triton kernel only what it ships first")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder for the results"
    )
    options = parser.parse_args(arguments)
    jobs = _jobs(options.only, options.target or shipping.TARGETS, options.quick)
    if not jobs:
        parser.error(f"no kernel is called like {options.only!r}")
    start = time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(run_job, jobs) for row in found]
    path = options.out / "gpu-static.json"
    last = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    worse = tables.regressions(last, rows)
    # A part of the kernels leaves the record of the others as it is.
    new = {(r["kernel"], r["target"]) for r in rows}
    whole = options.only is None and options.target is None and not options.quick
    kept = [] if whole else [r for r in last if (r["kernel"], r["target"]) not in new]
    record = {"tools": tables.versions(), "rows": sorted(kept + rows, key=lambda r: (r["kernel"], r["target"]))}
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(map(json.dumps, record["rows"]))  # a line each: what changed is seen in a diff
    path.write_text(f'{{"tools": {json.dumps(record["tools"])}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    path.with_suffix(".md").write_text(tables.markdown(record), encoding="utf-8")
    tables.show(rows)
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s. Written: {path}, {path.with_suffix('.md')}")
    problems = [f"{r['kernel']}, {r['target']}: {text}" for r in rows for text in r["problems"]]
    for text in problems:
        print(f"WRONG {text}", file=sys.stderr)
    for text in worse:
        print(f"WORSE than the last result: {text}", file=sys.stderr)
    return 1 if problems else 2 if worse else 0
