"""What each target's chip can do per clock and hold per multiprocessor, as its maker publishes it; occupancy."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Chip:
    """One chip of an architecture. Rates are per clock and multiprocessor (SM, or CU of AMD).

    Attributes:
        chip: the one that rates per second are for.
        warp: threads of a warp (wave).
        matrix_flops: dense 16-bit matrix products with float32 sums; 8-bit ones go twice as fast, TF32 half.
        ffma: lanes of float32 multiply-adds; alu: of 32-bit integer, logic and compare operations.
        special: lanes of exp2, log2, reciprocal, square root.
        issue: instructions of warps that start, over all schedulers.
        shared_bytes, l2_bytes: read from shared memory, and arriving from the L2 cache.
        dram_bytes_per_s, clock, processors: of the whole chip; clock in Hz, the boost of the stated peak rates.
        registers: 32-bit registers per multiprocessor; register_step: they are given to a warp in units of so many.
        shared_per_block, shared_per_processor, shared_reserved: bytes; what a block may ask for, what there is, and
            what the system takes of it for each block.
        matrix: the instruction for matrix products that this architecture brought.
        source: where the figures come from.
    """

    chip: str
    warp: int
    matrix_flops: int
    ffma: int
    alu: int
    special: int
    issue: int
    shared_bytes: int
    l2_bytes: int
    dram_bytes_per_s: float
    clock: float
    processors: int
    warps: int
    blocks: int
    registers: int
    register_step: int
    shared_per_block: int
    shared_per_processor: int
    shared_reserved: int
    matrix: str
    source: str

    @property
    def dram_bytes(self) -> float:
        """Bytes per clock that memory has for each multiprocessor, all of them asking."""
        return self.dram_bytes_per_s / self.clock / self.processors

    @property
    def peak(self) -> float:
        """FLOP/s of dense 16-bit matrix products."""
        return self.matrix_flops * self.processors * self.clock


_GUIDE = "CUDA C++ Programming Guide (arithmetic throughput and compute capability tables)"

# matrix_flops of each follows from the stated peak: A100 312 TFLOP/s, RTX A6000 155, H100 SXM 989, B200 2,250 (dense
# bf16), MI300X 1,307. NVIDIA states no rate from L2 for each SM; 64 B is the width of its port, which microbenchmarks
# approach.
CHIPS: dict[str, Chip] = {
    "sm_80": Chip(
        chip="A100 SXM 80 GB",
        warp=32,
        matrix_flops=2048,
        ffma=64,
        alu=64,
        special=16,
        issue=4,
        shared_bytes=128,
        l2_bytes=64,
        dram_bytes_per_s=2039e9,
        clock=1.41e9,
        processors=108,
        warps=64,
        blocks=32,
        registers=65536,
        register_step=256,
        shared_per_block=163 << 10,
        shared_per_processor=164 << 10,
        shared_reserved=1 << 10,
        matrix="mma.sync",
        source=f"NVIDIA A100 Tensor Core GPU Architecture (2020); {_GUIDE}",
    ),
    "sm_86": Chip(
        chip="RTX A6000",
        warp=32,
        matrix_flops=1024,
        ffma=128,
        alu=64,
        special=16,
        issue=4,
        shared_bytes=128,
        l2_bytes=64,
        dram_bytes_per_s=768e9,
        clock=1.80e9,
        processors=84,
        warps=48,
        blocks=16,
        registers=65536,
        register_step=256,
        shared_per_block=99 << 10,
        shared_per_processor=100 << 10,
        shared_reserved=1 << 10,
        matrix="mma.sync",
        source=f"NVIDIA Ampere GA102 GPU Architecture (2021); {_GUIDE}; GeForce cards have half the matrix rate",
    ),
    "sm_90": Chip(
        chip="H100 SXM",
        warp=32,
        matrix_flops=4096,
        ffma=128,
        alu=64,
        special=16,
        issue=4,
        shared_bytes=128,
        l2_bytes=64,
        dram_bytes_per_s=3352e9,
        clock=1.83e9,
        processors=132,
        warps=64,
        blocks=32,
        registers=65536,
        register_step=256,
        shared_per_block=227 << 10,
        shared_per_processor=228 << 10,
        shared_reserved=1 << 10,
        matrix="wgmma",
        source=f"NVIDIA H100 Tensor Core GPU Architecture (2022); {_GUIDE}",
    ),
    "sm_100": Chip(
        chip="B200",
        warp=32,
        matrix_flops=8192,
        ffma=128,
        alu=64,
        special=16,
        issue=4,
        shared_bytes=128,
        l2_bytes=64,
        dram_bytes_per_s=8000e9,
        clock=1.85e9,
        processors=148,
        warps=64,
        blocks=32,
        registers=65536,
        register_step=256,
        shared_per_block=227 << 10,
        shared_per_processor=228 << 10,
        shared_reserved=1 << 10,
        matrix="tcgen05",
        source=f"NVIDIA Blackwell Architecture Technical Brief (2024), HGX B200 data sheet; {_GUIDE}",
    ),
    "gfx942": Chip(
        chip="MI300X",
        warp=64,
        matrix_flops=2048,
        ffma=64,
        alu=64,
        special=16,
        issue=4,
        shared_bytes=128,
        l2_bytes=64,
        dram_bytes_per_s=5300e9,
        clock=2.1e9,
        processors=304,
        warps=32,
        blocks=32,
        # 512 registers of 64 lanes for each of 4 SIMDs, here in 32-bit registers.
        registers=4 * 512 * 64,
        register_step=8 * 64,
        shared_per_block=64 << 10,
        shared_per_processor=64 << 10,
        shared_reserved=0,
        matrix="mfma",
        source="AMD CDNA 3 Architecture white paper (2023), Instinct MI300 ISA reference guide",
    ),
}

_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that one multiprocessor holds at once, and what keeps it from holding more."""

    blocks: int
    warps: int
    limit: str


def occupancy(chip: Chip, *, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> Occupancy:
    """How many blocks fit.

    Args:
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
        tensor_memory: columns that a block allocates (sm_100).
    """
    # Registers belong to one of four quarters (schedulers), and a warp stays with its quarter.
    step = chip.register_step
    per_warp = -(-max(registers, 1) * chip.warp // step) * step
    fit = 4 * (chip.registers // 4 // per_warp)
    limits = {
        "warps": chip.warps // warps,
        "blocks": chip.blocks,
        "registers": fit // warps,
    }
    if shared:
        limits["shared memory"] = chip.shared_per_processor // (shared + chip.shared_reserved)
    if tensor_memory:
        limits["tensor memory"] = _TENSOR_MEMORY_COLUMNS // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps, limit)
