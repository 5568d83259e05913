"""SASS and AMD assembly: instructions, the loops they form, and how much work of each pipe a loop holds."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Instruction",
    "amdgcn",
    "bytes_moved",
    "count",
    "loops",
    "main_loop",
    "matrix_instructions",
    "matrix_work",
    "multiply_adds",
    "pipe",
    "product_loop",
    "sass",
]


@dataclass(frozen=True)
class Instruction:
    """One instruction: its place in the listing, its name with all modifiers, and its operands as text."""

    name: str
    operands: str
    conditional: bool = False
    label: str | None = None
    """The label that stands before it."""

    @property
    def base(self) -> str:
        """The name without modifiers: HMMA of HMMA.16816.F32."""
        return self.name.split(".")[0]


_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;?\s*}?\s*$")
_LABEL = re.compile(r"^(\.L\w+):")


def sass(text: str, function: str | None = None) -> list[Instruction]:
    """The instructions of a listing of `nvdisasm -c`, of one function's section where it is named."""
    found: list[Instruction] = []
    label: str | None = None
    inside = function is None
    for line in text.splitlines():
        if line.startswith("//----"):
            inside = line.split()[1].startswith(".text.") and function in (None, line.split()[1][len(".text.") :])
        elif inside and (match := _LABEL.match(line)):
            label = match[1]
        elif inside and (match := _SASS.match(line)):
            found.append(Instruction(match[2], match[3], match[1] is not None, label))
            label = None
    return found


_AMD = re.compile(r"^\s+([a-z]+_\w+)\s*([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of AMD's assembly, as the compiler writes it."""
    found: list[Instruction] = []
    label: str | None = None
    for line in text.splitlines():
        if match := _AMD_LABEL.match(line):
            label = match[1]
        elif match := _AMD.match(line):
            found.append(Instruction(match[1], match[2].strip(), match[1].startswith("s_cbranch"), label))
            label = None
    return found


_TARGET = re.compile(r"\.L\w+")


def _jump(instruction: Instruction) -> tuple[str | None, bool] | None:
    """Of an instruction that ends a basic block: where it may go, and whether the next one may follow; else None."""
    base = instruction.base
    if base in ("EXIT", "RET", "s_endpgm"):
        return None, instruction.conditional
    if base in ("BRA", "s_branch") or base.startswith("s_cbranch"):
        target = _TARGET.search(instruction.operands)
        # BRA.DIV and BRA.U carry their condition as an operand.
        falls = instruction.conditional or "," in instruction.operands or "UP" in instruction.operands
        return (target[0] if target else None), falls
    return None


def loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of instruction indices: of each jump back to a place that all ways lead through."""
    labels = {instruction.label: at for at, instruction in enumerate(code) if instruction.label}
    starts = sorted({0, *labels.values(), *(at + 1 for at, i in enumerate(code) if _jump(i) and at + 1 < len(code))})
    ends = [*starts[1:], len(code)]
    block_of = {start: number for number, start in enumerate(starts)}
    follow: list[list[int]] = []
    for start, end in zip(starts, ends, strict=True):
        jump = _jump(code[end - 1]) if end > start else None
        target, falls = jump if jump else (None, True)
        after = [block_of[labels[target]]] if target in labels else []
        if falls and end < len(code):
            after.append(block_of[end])
        follow.append(after)
    before: dict[int, set[int]] = defaultdict(set)
    for block, after in enumerate(follow):
        for other in after:
            before[other].add(block)
    bodies: dict[int, set[int]] = defaultdict(set)
    dominators = _dominators(follow, before)
    for tail, after in enumerate(follow):
        for head in after:
            if head in dominators.get(tail, ()):
                body, todo = bodies[head] | {head}, [tail]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo.extend(before[block])
                bodies[head] = body
    return [frozenset(at for block in body for at in range(starts[block], ends[block])) for body in bodies.values()]


def _dominators(follow: Sequence[Sequence[int]], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached from the first, the blocks that every way to it leads through."""
    order, seen, todo = [], {0}, [0]
    while todo:
        block = todo.pop()
        order.append(block)
        for other in follow[block]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    found = {block: set(seen) for block in seen} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[other] for other in before[block] if other in seen)) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


# Which unit an instruction keeps busy, by the beginning of its name, or by the whole of it.
_SASS_PIPES = (
    ("tensor", ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "BGMMA", "UTCHMMA", "UTCQMMA")),
    ("tensor", ("UTCIMMA", "UTCOMMA")),
    ("spill", ("LDL", "STL")),
    ("shared", ("LDSM", "LDS", "STSM", "STS", "ATOMS", "SHFL")),
    ("barrier", ("LDGDEPBAR", "DEPBAR", "WARPGROUP", "SYNCS", "FENCE", "MEMBAR", "WARPSYNC", "UTCBAR", "CCTL")),
    ("barrier", ("NANOSLEEP", "ERRBAR", "ELECT", "UTMACMDFLUSH", "ARRIVES")),
    ("global load", ("LDG", "UBLKCP", "UTMALDG", "UTMAPF")),
    ("global store", ("STG", "ATOM", "UTMASTG", "UTMAREDG")),
    ("tensor memory", ("LDTM", "STTM", "UTCCP", "UTCATOMSWS")),
    ("special", ("MUFU", "POPC", "FLO", "FRND")),
    ("fp64", ("DADD", "DMUL", "DFMA", "DSETP")),
    ("fma", ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "IMAD", "IDP", "FSWZADD")),
    ("control", ("BRX", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "NOP", "BREAK", "YIELD", "BPT", "BMOV", "JMP")),
    ("constant", ("LDC", "ULDC")),
    ("uniform", ("R2UR", "S2UR")),
)
_SASS_WHOLE = {"BAR": "barrier", "BRA": "control", "RED": "global store", "LD": "global load", "ST": "global store"}
_SASS_WHOLE |= dict.fromkeys(("I2F", "F2I", "F2F"), "special")
# All of AMD's vector arithmetic is one unit's.
_AMD_PIPES = (
    ("tensor", ("v_mfma", "v_smfmac")),
    ("spill", ("scratch_",)),
    ("special", ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos")),
    ("barrier", ("s_barrier", "s_waitcnt", "s_sleep", "s_nop")),
    ("control", ("s_cbranch", "s_branch", "s_endpgm")),
    ("shared", ("ds_",)),
    ("global load", ("global_load", "buffer_load", "flat_load")),
    ("global store", ("global_store", "buffer_store", "flat_store", "global_atomic", "buffer_atomic", "flat_atomic")),
    ("constant", ("s_load", "s_buffer_load")),
    ("uniform", ("s_",)),
)


def pipe(instruction: Instruction) -> str:
    """The unit that executes it; "alu" where no other does."""
    name = instruction.base
    if name.islower():
        return next((found for found, starts in _AMD_PIPES if name.startswith(starts)), "alu")
    if name in _SASS_WHOLE:
        return _SASS_WHOLE[name]
    rest = "uniform" if name.startswith("U") else "alu"
    return next((found for found, starts in _SASS_PIPES if name.startswith(starts)), rest)


def count(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions of each pipe, the most numerous first."""
    return dict(Counter(map(pipe, code)).most_common())


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The loop in which the kernel spends its time: the innermost one with most matrix products, else with most loads
    from memory. Of two alike (blocks with a mask, and blocks without) the one with fewer instructions, whose turns
    are most. A kernel without such a loop is all of it."""
    found = loops(code)
    for wanted in ("tensor", "global load"):
        holds = {body: sum(pipe(code[at]) == wanted for at in body) for body in found}
        if best := _innermost(holds):
            return [code[at] for at in sorted(best)]
    return list(code)


def product_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The main loop of a kernel that multiplies matrices without an instruction for it: the innermost one with most
    multiply-adds of float32, of those without the special unit, which exponentials and gates take. Of two alike, that
    which reads shared memory: the other is for what had no room there."""
    holds: dict[frozenset[int], int] = {}
    for body in loops(code):
        pipes = Counter(pipe(code[at]) for at in body)
        if not pipes["special"]:
            holds[body] = 1000 * multiply_adds(code[at] for at in body) + pipes["shared"]
    best = _innermost(holds)
    return [code[at] for at in sorted(best)] if best else main_loop(code)


def _innermost(holds: dict[frozenset[int], int]) -> frozenset[int] | None:
    """Of the loops that hold anything and have none such within, that with most; of two alike the shorter one."""
    having = [body for body in holds if holds[body]]
    inner = [body for body in having if not any(other < body for other in having)]
    return max(inner, key=lambda body: (holds[body], -len(body)), default=None)


def multiply_adds(code: Iterable[Instruction]) -> int:
    """Multiply-adds of float32 that one lane does."""
    return sum({"FFMA": 1, "FFMA2": 2}.get(instruction.base, 0) for instruction in code)


_FAMILIES = (
    ("wgmma", ("HGMMA", "IGMMA", "QGMMA", "BGMMA")),
    ("tcgen05", ("UTC",)),
    ("mma.sync", ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA")),
    ("mfma", ("v_mfma", "v_smfmac")),
)


def matrix_instructions(code: Iterable[Instruction]) -> list[str]:
    """The kinds of matrix instruction used: wgmma, tcgen05, mma.sync, mfma."""
    names = {instruction.base for instruction in code if pipe(instruction) == "tensor"}
    return [family for family, starts in _FAMILIES if any(name.startswith(starts) for name in names)]


_SHAPES = (
    (re.compile(r"^[HIQ]MMA\.(?:SP\.)?(16)(8)(\d+)\b"), 1),
    (re.compile(r"^[HIQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)"), 4),
    (re.compile(r"^v_mfma_\w+?_(\d+)x(\d+)x(\d+)"), 1),
)
# Rates against 16-bit products.
_HALF, _DOUBLE = re.compile(r"TF32|xf32"), re.compile(r"^[IQ]G?MMA|E4M3|E5M2|i8|fp8|bf8")
_EIGHTH = re.compile(r"v_mfma_f32_\w+_f32$|v_mfma_f32_\d+x\d+x\d+f32")


def matrix_work(code: Iterable[Instruction]) -> tuple[float, float]:
    """Floating-point operations of the matrix products of one warp, and the same weighted by how much slower than
    16-bit ones they go. Zero where the instruction does not say its shape (tcgen05)."""
    total = weighted = 0.0
    for instruction in code:
        for shape, warps in _SHAPES:
            if match := shape.match(instruction.name):
                flops = 2.0 * int(match[1]) * int(match[2]) * int(match[3]) / warps
                name = instruction.name
                slower = 8.0 if _EIGHTH.search(name) else 2.0 if _HALF.search(name) else 1.0
                total += flops
                weighted += flops * (0.5 if _DOUBLE.search(name) else slower)
    return total, weighted


_WIDTH = re.compile(r"\.(?:U?)(128|64|16|8)\b")


def _amd_width(name: str) -> int:
    for end, size in (
        ("x4", 16),
        ("x3", 12),
        ("x2", 8),
        ("b128", 16),
        ("b96", 12),
        ("b64", 8),
        ("b16", 2),
        ("short", 2),
    ):
        if end in name:
            return size * (2 if "read2" in name or "write2" in name else 1)
    return 1 if "byte" in name or "b8" in name else 4 * (2 if "2_b32" in name or "2st64_b32" in name else 1)


def bytes_moved(code: Iterable[Instruction], wanted: str) -> int:
    """Bytes that one thread moves with the instructions of a pipe (matrices of LDSM: its share of them)."""
    total = 0
    for instruction in code:
        if pipe(instruction) != wanted:
            continue
        name = instruction.name
        if name.islower():
            total += _amd_width(name)
        elif instruction.base in ("LDSM", "STSM"):
            total += 4 * int(name[-1]) if name[-2:] in (".2", ".4") else 4
        elif match := _WIDTH.search(name):
            total += int(match[1]) // 8
        else:
            total += 4
    return total
