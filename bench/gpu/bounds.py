"""How fast a kernel's main loop can turn at best, by the unit that it keeps busiest."""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu.chips import Chip
from bench.gpu.compiled import Facts
from fastlm.kernels.triton.shipped import Work

__all__ = ["Bound", "bound"]


@dataclass(frozen=True)
class Bound:
    """Cycles of one multiprocessor for one turn of a block's main loop.

    Attributes:
        cycles: by unit, if it were the only one that took time.
        unit: the busiest.
        of: what `share` is a share of: "tensor", the peak of matrix products; "memory", the bandwidth; "fma", the peak
            of float32, for products without a matrix instruction.
        share: of that peak where all units work at the same time as the busiest one: not to be exceeded.
        in_turns: the same where products (or memory), and all else at the pace of its own busiest unit, take turns:
            what a block reaches whose warps run in step.
    """

    cycles: dict[str, float]
    unit: str
    of: str
    share: float
    in_turns: float


def bound(chip: Chip, facts: Facts, work: Work) -> Bound:
    """The bound of a loop.

    The code may hold several turns as the source has them (unrolled): so many as its matrix products are of those that
    `work` says a turn has. Only useful products count: where some are done twice, the share is lower.
    """
    threads = facts.warps * chip.warp
    turns = 1.0
    if facts.matrix_flops and work.tensor_flops:
        turns = max(1.0, float(int(facts.matrix_flops / work.tensor_flops + 0.05)))
    # tcgen05 does not say in the code what it multiplies.
    tensor = (facts.weighted_flops or work.tensor_flops * turns) if facts.matrix else 0.0
    counts = facts.pipes
    read = max(facts.read_bytes, work.bytes * turns)
    cycles = {
        "tensor": tensor / chip.matrix_flops,
        "special": counts.get("special", 0) * threads / chip.special,
        "fma": counts.get("fma", 0) * threads / chip.ffma,
        "alu": counts.get("alu", 0) * threads / chip.alu,
        "issue": sum(counts.values()) * facts.warps / chip.issue,
        "shared": facts.shared_bytes / chip.shared_bytes,
        "L2": read / chip.l2_bytes,
    }
    if work.streamed or not work.tensor_flops:
        cycles["memory"] = (read + facts.written_bytes) / chip.dram_bytes
    cycles = {unit: round(value, 1) for unit, value in cycles.items() if value}
    unit = max(cycles, key=lambda name: cycles[name])
    if "memory" in cycles and cycles["memory"] >= cycles.get("tensor", 0.0):
        of, needed = "memory", cycles["memory"]
    elif tensor:
        # Useful products at the rate of their precision, against the peak of that precision.
        slower = facts.weighted_flops / facts.matrix_flops if facts.matrix_flops else 1.0
        of, needed = "tensor", (work.tensor_flops * turns * slower or tensor) / chip.matrix_flops
    else:
        of, needed = "fma", work.tensor_flops * turns / (2 * chip.ffma)
    others = [value for name, value in cycles.items() if name not in (of, "L2")]
    return Bound(cycles, unit, of, needed / cycles[unit], needed / (cycles.get(of, 0.0) + max(others, default=0.0)))
