"""The report of compiled kernels: what it reads from listings, what it computes, and that planted faults are found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import bounds, chips, compiled, disassembly, static, tables
from bench.gpu.compiled import Facts
from bench.gpu.disassembly import Instruction
from fastlm.kernels.triton.shipped import TARGETS, Shipped, Work

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# A loop of sm_90 shortened: a wait that stands behind the kernel's end and jumps back, as the compiler places it.
_SASS = """
//--------------------- .text.other                --------------------------
        /*0000*/                   DADD R0, R0, R0 ;
//--------------------- .text.attn                --------------------------
        .global         attn
attn:
.text.attn:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*00f0*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*1330*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*18a0*/              @!P5 BRA `(.L_x_7) ;
.L_x_6:
        /*1400*/                   LDGSTS.E.BYPASS.128 [R33], desc[UR12][R2.64] ;
        /*1410*/                   LDG.E.U16 R3, desc[UR12][R2.64] ;
        /*13d0*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*13e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1700*/                   MUFU.EX2 R146, R93 ;
        /*1710*/                   FFMA R89, R89, UR20, -R138.reuse ;
        /*1820*/                   F2FP.BF16.F32.PACK_AB R128, R152, R151 ;
        /*1830*/                   LDSM.16.MT88.4 R8, [R4] ;
        /*1840*/                   @UP0 SYNCS.EXCH.64 URZ, [UR11+0x20200], UR6 ;
        /*1870*/                   BRA.U UP2, `(.L_x_1) ;
.L_x_0:
        /*25c0*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*25d0*/                   STG.E.128 desc[UR12][R2.64], R4 ;
        /*25e0*/                   EXIT ;
.L_x_7:
        /*6270*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR11+0x20200], R4 ;
        /*6280*/              @!P5 BRA `(.L_x_7) ;
        /*6290*/                   BRA `(.L_x_6) ;
.L_x_3:
        /*0c10*/                   BRA `(.L_x_3);
"""

# All of a kernel of gfx942 that doubles a vector: its loop's end stands before its beginning.
_AMD = """
	s_cmp_ge_i32 s7, s6
	.loc	1 28 17 is_stmt 1               ; k.py:28:17
	s_cbranch_scc1 .LBB0_5
; %bb.1:                                ; %.lr.ph.preheader
	s_branch .LBB0_3
.LBB0_2:                                ; %.critedge
                                        ;   in Loop: Header=BB0_3 Depth=1
	s_or_b64 exec, exec, s[0:1]
	s_cbranch_scc0 .LBB0_5
.LBB0_3:                                ; %.lr.ph
	v_add_u32_e32 v0, s7, v2
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_2
; %bb.4:                                ;   in Loop: Header=BB0_3 Depth=1
	global_load_dwordx4 v[4:7], v[4:5], off
	s_waitcnt vmcnt(0)
	v_pk_add_f32 v[4:5], v[4:5], v[4:5]
	global_store_dwordx4 v[0:1], v[4:7], off
	s_branch .LBB0_2
.LBB0_5:                                ; %._crit_edge
	s_endpgm
    .vgpr_count:     10
    .private_segment_fixed_size: 12
    .vgpr_spill_count: 2
    .sgpr_spill_count: 7
"""


def test_the_main_loop_is_found_with_its_wait_behind_the_end() -> None:
    code = disassembly.sass(_SASS, "attn")
    assert code[0].name == "LDC"
    assert code[1] == Instruction("BRA", "`(.L_x_0)", True)
    assert sorted(len(body) for body in disassembly.loops(code)) == [2, 15]  # what follows the end can't be reached
    loop = disassembly.main_loop(code)
    assert disassembly.count(loop) == {
        "barrier": 4,
        "control": 4,
        "global load": 2,
        "tensor": 1,
        "special": 1,
        "fma": 1,
        "alu": 1,
        "shared": 1,
    }
    assert disassembly.matrix_instructions(loop) == ["wgmma"]
    # A quarter of a warp group's product belongs to each warp.
    assert disassembly.matrix_work(loop) == (2 * 64 * 128 * 16 / 4, 2 * 64 * 128 * 16 / 4)
    assert disassembly.bytes_moved(loop, "global load") == 16 + 2
    assert disassembly.bytes_moved(loop, "shared") == 16
    assert len(disassembly.sass(_SASS)) == len(code) + 1


def test_amd_loops_resources_and_bytes() -> None:
    facts = compiled.read_amdgcn(_AMD, warps=4, shared=0)
    assert facts.pipes == {"uniform": 2, "control": 3, "alu": 2, "global load": 1, "barrier": 1, "global store": 1}
    assert (facts.registers, facts.spills, facts.scalar_spills) == (10, 4 * 2 + 12, 7)
    assert facts.read_bytes == facts.written_bytes == 16 * 4 * 64
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        compiled.read_amdgcn("", warps=4, shared=0)


def test_of_two_loops_alike_the_one_without_a_mask_is_the_main_one() -> None:
    def text(label: str, *names: str) -> str:
        return (
            f"{label}:\n"
            + "".join(f"        /*0000*/ {n} R0, R1 ;\n" for n in names)
            + f"/*00*/ @P0 BRA `({label}) ;\n"
        )

    masked = text(".L_1", "HMMA.16816.F32", "FSEL", "FSEL")
    plain = text(".L_2", "HMMA.16816.F32", "FADD")
    for order in (masked + plain, plain + masked):
        assert disassembly.count(disassembly.main_loop(disassembly.sass(order))) == {
            "tensor": 1,
            "fma": 1,
            "control": 1,
        }


def test_the_product_loop_is_that_with_the_multiply_adds_but_no_gates() -> None:
    def text(label: str, *names: str) -> str:
        body = "".join(f"        /*0000*/ {n} R0, R1 ;\n" for n in names)
        return f"{label}:\n{body}/*00*/ @P0 BRA `({label}) ;\n"

    gates = text(".L_1", *["FFMA"] * 9, "MUFU.EX2", "LDG.E")
    elsewhere = text(".L_2", "FFMA", "FFMA", "LDG.E.128")
    product = text(".L_3", "FFMA", "FFMA", "LDS.128", "IADD3")
    for order in (gates + elsewhere + product, product + gates + elsewhere):
        loop = disassembly.product_loop(disassembly.sass(order))
        assert disassembly.count(loop) == {"fma": 2, "shared": 1, "alu": 1, "control": 1}
        assert disassembly.multiply_adds(loop) == 2
    assert disassembly.multiply_adds(disassembly.sass(text(".L_1", "FFMA2", "FMUL"))) == 2


def test_products_of_a_sequence_are_bound_by_what_its_loop_keeps_busy() -> None:
    loop = facts(matrix=[], matrix_flops=0, weighted_flops=0, multiply_adds=128, pipes={"fma": 140}, shared_bytes=49152)
    resident = dataclasses.replace(loop, read_bytes=0)
    bound = static.row("lstm_sequence_kernel<float, 8>", "sm_90", resident, None)["bound"]
    assert (bound["unit"], bound["of"]) == ("shared", "fma")
    assert bound["share"] == pytest.approx(128 * 256 / 128 / 384)
    assert static.row("lstm_step_kernel<float, 1, 4>", "sm_90", loop, None)["bound"]["of"] == "memory"


@pytest.mark.parametrize(
    ("name", "pipe"),
    [
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("F2F.F64.F32", "special"),
        ("FMNMX3", "alu"),
        ("FADD2", "fma"),
        ("IMAD.WIDE.U32", "fma"),
        ("REDUX", "alu"),
        ("RED.E.ADD.F32", "global store"),
        ("UTCHMMA", "tensor"),
        ("UTCBAR", "barrier"),
        ("LDTM.x64", "tensor memory"),
        ("UTMALDG.2D", "global load"),
        ("LDGDEPBAR", "barrier"),
        ("LDCU.64", "constant"),
        ("UIADD3", "uniform"),
        ("STL.64", "spill"),
        ("v_exp_f32_e32", "special"),
        ("v_mfma_f32_32x32x8_bf16", "tensor"),
        ("ds_read_b128", "shared"),
        ("scratch_load_dword", "spill"),
    ],
)
def test_pipes(name: str, pipe: str) -> None:
    assert disassembly.pipe(Instruction(name, "")) == pipe


@pytest.mark.parametrize(
    ("name", "flops", "slower"),
    [
        ("HMMA.16816.F32.BF16", 4096, 1.0),
        ("HMMA.1688.F32.TF32", 2048, 2.0),
        ("IMMA.16832.S8.S8", 8192, 0.5),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 65536, 0.5),
        ("v_mfma_f32_16x16x16_bf16", 8192, 1.0),
        ("v_mfma_f32_32x32x16_fp8_fp8", 32768, 0.5),
        ("v_mfma_f32_32x32x2_f32", 4096, 8.0),
    ],
)
def test_matrix_work(name: str, flops: float, slower: float) -> None:
    assert disassembly.matrix_work([Instruction(name, "")]) == (flops, flops * slower)


@pytest.mark.parametrize(
    ("target", "asked", "expected"),
    [
        # As NVIDIA's occupancy calculator has it.
        ("sm_80", {"warps": 8, "registers": 32, "shared": 0}, (8, 64, "warps")),
        ("sm_80", {"warps": 8, "registers": 33, "shared": 0}, (6, 48, "registers")),
        ("sm_80", {"warps": 4, "registers": 255, "shared": 0}, (2, 8, "registers")),
        ("sm_80", {"warps": 1, "registers": 32, "shared": 0}, (32, 32, "blocks")),
        ("sm_86", {"warps": 8, "registers": 32, "shared": 0}, (6, 48, "warps")),
        ("sm_86", {"warps": 4, "registers": 64, "shared": 48 << 10}, (2, 8, "shared memory")),
        ("sm_90", {"warps": 12, "registers": 168, "shared": 1 << 10}, (1, 12, "registers")),
        ("sm_90", {"warps": 4, "registers": 64, "shared": 114 << 10}, (1, 4, "shared memory")),
        ("sm_90", {"warps": 4, "registers": 64, "shared": 113 << 10}, (2, 8, "shared memory")),
        ("sm_100", {"warps": 4, "registers": 64, "shared": 0, "tensor_memory": 256}, (2, 8, "tensor memory")),
        ("gfx942", {"warps": 4, "registers": 128, "shared": 0}, (4, 16, "registers")),
        ("gfx942", {"warps": 4, "registers": 512, "shared": 0}, (1, 4, "registers")),
        ("gfx942", {"warps": 8, "registers": 512, "shared": 0}, (0, 0, "registers")),
    ],
)
def test_occupancy(target: str, asked: dict[str, int], expected: tuple[int, int, str]) -> None:
    found = chips.occupancy(chips.CHIPS[target], **asked)
    assert (found.blocks, found.warps, found.limit) == expected


def test_the_table_of_chips_gives_the_peaks_that_are_published() -> None:
    assert set(chips.CHIPS) == set(TARGETS)
    peaks = {"sm_80": 312, "sm_86": 154.8, "sm_90": 989.4, "sm_100": 2250, "gfx942": 1307.4}
    for target, teraflops in peaks.items():
        assert chips.CHIPS[target].peak == pytest.approx(teraflops * 1e12, rel=0.01)


def facts(**changes: Any) -> Facts:
    """A loop of sm_90 with 8 warps: 128 x 128 scores with 128 components."""
    plain = Facts(
        warps=8,
        registers=200,
        spills=0,
        scalar_spills=0,
        shared=160 << 10,
        tensor_memory=0,
        matrix=["wgmma"],
        pipes={"tensor": 24, "special": 66, "fma": 200, "alu": 100},
        matrix_flops=4 * 128**3,
        weighted_flops=4 * 128**3,
        read_bytes=2 * 128 * 128 * 2,
        written_bytes=0,
        shared_bytes=0,
        instructions=390,
        multiply_adds=0,
    )
    return dataclasses.replace(plain, **changes)


def test_the_bound_by_hand() -> None:
    chip, work = chips.CHIPS["sm_90"], Work(tensor_flops=4 * 128**3)
    found = bounds.bound(chip, facts(), work)
    assert found.cycles == {
        "tensor": 4 * 128**3 / 4096,
        "special": 66 * 256 / 16,
        "fma": 200 * 256 / 128,
        "alu": 100 * 256 / 64,
        "issue": 390 * 8 / 4,
        "L2": 65536 / 64,
    }
    assert (found.unit, found.of, found.share) == ("tensor", "tensor", 1.0)
    assert found.in_turns == pytest.approx(2048 / (2048 + 1056))
    slow = bounds.bound(chip, facts(pipes={"special": 256}), work)
    assert (slow.unit, slow.share) == ("special", 0.5)
    # Products that every second warp repeats are not useful ones; a loop unrolled twice has twice the work.
    assert bounds.bound(chip, facts(weighted_flops=6 * 128**3, matrix_flops=6 * 128**3), work).share == pytest.approx(
        2 / 3
    )
    assert bounds.bound(chip, facts(weighted_flops=8 * 128**3, matrix_flops=8 * 128**3), work).share == 1.0
    # 8-bit products go twice as fast, and so does their peak.
    assert bounds.bound(chip, facts(weighted_flops=2 * 128**3), work).cycles["tensor"] == 1024
    copy = facts(matrix_flops=0, weighted_flops=0, matrix=[], pipes={"global load": 4}, written_bytes=65536)
    memory = bounds.bound(chip, copy, Work())
    assert (memory.unit, memory.of) == ("memory", "memory")
    # The same products on a cache that is read once: memory is what they wait for.
    decode = bounds.bound(chip, facts(), Work(tensor_flops=4 * 128**3, streamed=True))
    assert (decode.of, decode.unit, decode.share) == ("memory", "memory", 1.0)
    # Without a matrix instruction, products are FMAs.
    without = facts(matrix=[], matrix_flops=0, weighted_flops=0, pipes={"fma": 5120})
    fma = bounds.bound(chip, without, Work(tensor_flops=2 * 128 * 128 * 64))
    assert (fma.of, fma.unit, fma.share) == ("fma", "fma", pytest.approx(0.8))
    assert memory.cycles["memory"] == pytest.approx(131072 / (3352e9 / 1.83e9 / 132), rel=1e-3)


def shipped(**changes: Any) -> Shipped:
    return Shipped("k", None, {}, {}, 8, 2, must_use=("wgmma", "tcgen05"), **changes)


@pytest.mark.parametrize(
    ("target", "fault", "word"),
    [
        ("sm_90", {"spills": 8}, "spills 8 bytes"),
        ("sm_90", {"pipes": {"spill": 1}}, "spills"),
        ("sm_86", {}, "shared memory of 163840 bytes, above sm_86's 101376"),
        ("sm_90", {"matrix": ["mma.sync"]}, "no wgmma, but mma.sync"),
        ("sm_100", {"matrix": []}, "no tcgen05, but no matrix instruction"),
    ],
)
def test_faults_are_found(target: str, fault: dict[str, Any], word: str) -> None:
    assert not static.row("k", "sm_90", facts(), shipped())["problems"]
    assert word in ". ".join(static.row("k", target, facts(**fault), shipped())["problems"])


def test_what_got_worse_is_found() -> None:
    before = [static.row("k", "sm_90", facts(registers=128), shipped(work=Work(4 * 128**3)))]
    assert not tables.regressions(before, before)
    changed = facts(
        registers=256, spills=4, scalar_spills=3, instructions=500, matrix=["mma.sync"], pipes={"special": 256}
    )
    now = [static.row("k", "sm_90", changed, shipped(work=Work(4 * 128**3)))]
    lines = tables.regressions(before, now)
    words = (
        "spilled bytes 4, was 0",
        "scalar spills 3, was 0",
        "share of peak 0.50, was 1.00",
        "instructions 500, was 390",
        "mma.sync, was wgmma",
    )
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    fewer = [before[0] | {"occupancy": before[0]["occupancy"] | {"blocks": 0}}]
    assert tables.regressions(before, fewer) == ["k, sm_90: blocks 0, was 1"]
    assert not tables.regressions([], now)
    text = tables.markdown({"tools": {"Triton": "3"}, "rows": now})
    assert "k **spills 4 bytes a thread" in text and "| 4 + 3 scalar |" in text
    del before[0]["scalar_spills"]  # as in a record from before they were counted
    assert not any("scalar" in line for line in tables.regressions(before, now))


def test_what_cuobjdump_prints() -> None:
    text = "Resource usage:\n Common:\n  GLOBAL:0\n Function k:\n  REG:28 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:584\n"
    assert compiled.usage(text) == {"k": (28, 12, 16)}
    elf = ".nv.info.k\n\t<0x7>\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x20 0x4 0x1 \n"
    assert compiled.block_sizes(elf) == {"k": 128}


# Compiled in another process: this one's Triton may be the interpreter's.
_KERNELS = """
import triton
import triton.language as tl
from fastlm.kernels.triton.shipped import Shipped, Work

@triton.jit
def attention(Q, K, V, O, T, stride, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(Q + m[:, None] * stride + d[None, :], mask=m[:, None] < T, other=0.0)
    total = tl.zeros([BM, D], tl.float32)
    largest = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    for block in range(0, T // BN):
        n = block * BN + tl.arange(0, BN)
        k = tl.load(K + n[None, :] * stride + d[:, None])
        v = tl.load(V + n[:, None] * stride + d[None, :])
        s = tl.dot(q, k)
        now = tl.maximum(largest, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - now[:, None])
        fade = tl.math.exp2(largest - now)
        mass = mass * fade + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * fade[:, None])
        largest = now
    tl.store(O + m[:, None] * stride + d[None, :], (total / mass[:, None]).to(tl.bfloat16), mask=m[:, None] < T)

def config(bm, bn, d, warps, stages, targets):
    types = dict(Q="*bf16", K="*bf16", V="*bf16", O="*bf16", T="i32", stride="i32", scale="fp32")
    return Shipped(f"attention {bm} {bn} {d}", attention, types, dict(BM=bm, BN=bn, D=d), warps, stages, targets,
        ("Q", "K", "V", "O", "T", "stride"), Work(4 * bm * bn * d, bm * bn, 4 * bn * d), ("wgmma", "tcgen05"))

def shipped():
    yield config(64, 64, 64, 4, 2, ("sm_80", "sm_86", "sm_90"))
    yield config(128, 64, 64, 4, 2, ("sm_100", "gfx942"))
    yield config(128, 64, 128, 4, 2, ("sm_80",))
"""
_SCRIPT = """
import json, sys, kernels
from bench.gpu import compiled, static
rows = [static.row(s.name, t, compiled.compile_triton(s, t), s) for s in kernels.shipped() for t in s.targets]
print(json.dumps(rows))
"""


@needs_triton
def test_a_kernel_is_compiled_for_every_target_and_one_that_spills_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(_KERNELS)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    *good, spilling = json.loads(done.stdout.splitlines()[-1])
    assert {row["target"]: row["matrix"] for row in good} == {t: [chips.CHIPS[t].matrix] for t in TARGETS}
    for row in good:
        assert not row["problems"], row
        assert 0.2 < row["bound"]["in_turns"] <= row["bound"]["share"] <= 1.0
        if row["matrix_flops"]:  # the code's products are those of the source
            assert row["matrix_flops"] == 4 * int(row["kernel"].split()[1]) * 64 * 64
        assert row["pipes"]["special"] * row["warps"] * chips.CHIPS[row["target"]].warp >= 64 * 64
        assert row["occupancy"]["blocks"] >= 1
    assert "spills" in spilling["problems"][0]


def _report(out: Path, *arguments: str) -> list[dict[str, Any]]:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "bench", "gpu-static", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu-static.md").read_text(encoding="utf-8").count("\n| ") > 5
    rows: list[dict[str, Any]] = json.loads((out / "gpu-static.json").read_text(encoding="utf-8"))["rows"]
    return rows


@needs_triton
def test_each_shipped_kernel_compiles_in_one_configuration(tmp_path: Path) -> None:
    rows = _report(tmp_path, "--quick", "--target", "sm_90", "--target", "gfx942")  # all take minutes
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert not [row["problems"] for row in rows if row["problems"]]


@needs_triton
@pytest.mark.slow
def test_all_that_is_shipped_compiles(tmp_path: Path) -> None:
    rows = _report(tmp_path)
    assert not [row["problems"] for row in rows if row["problems"]]
