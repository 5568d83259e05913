"""Kernels compiled ahead of time for a target, and what their machine code says."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu import disassembly
from bench.gpu.disassembly import Instruction
from fastlm.kernels.triton.shipped import Shipped

__all__ = ["Facts", "compile_cuda", "compile_triton", "tool"]


@dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel says.

    Attributes:
        warps: of a block.
        registers: of a thread. AMD's vector registers of both kinds.
        spills: bytes of each thread that registers had no room for (stack, private memory).
        scalar_spills: AMD's scalar registers that went to lanes of vector registers: instructions more, no memory.
        shared: bytes of a block.
        tensor_memory: columns of a block (sm_100).
        matrix: kinds of matrix instruction in the main loop.
        pipes: instructions of a warp in one turn of the main loop, by pipe.
        matrix_flops: operations that those of a block do; weighted_flops: counted in time of 16-bit products. 0 where
            the code does not say (tcgen05).
        read_bytes, written_bytes, shared_bytes: moved by a block in that turn, as far as the code says: loads by the
            tensor memory accelerator carry no size.
        instructions: of that turn, all pipes.
        multiply_adds: of float32, that each thread does in it.
    """

    warps: int
    registers: int
    spills: int
    scalar_spills: int
    shared: int
    tensor_memory: int
    matrix: list[str]
    pipes: dict[str, int]
    matrix_flops: float
    weighted_flops: float
    read_bytes: int
    written_bytes: int
    shared_bytes: int
    instructions: int
    multiply_adds: int

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def _facts(loop: Sequence[Instruction], *, warps: int, warp: int, scalar_spills: int = 0, **resources: int) -> Facts:
    flops, weighted = disassembly.matrix_work(loop)
    moved = {
        kind: disassembly.bytes_moved(loop, kind) * warps * warp for kind in ("global load", "global store", "shared")
    }
    return Facts(
        warps=warps,
        matrix=disassembly.matrix_instructions(loop),
        pipes=disassembly.count(loop),
        matrix_flops=flops * warps,
        weighted_flops=weighted * warps,
        read_bytes=moved["global load"],
        written_bytes=moved["global store"],
        shared_bytes=moved["shared"],
        instructions=len(loop),
        multiply_adds=disassembly.multiply_adds(loop),
        scalar_spills=scalar_spills,
        **resources,
    )


def compile_triton(shipped: Shipped, target: str) -> Facts:
    """Compiles one configuration for "sm_90", "gfx942", ...; no GPU is needed.

    Raises whatever Triton raises where it can't be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = shipped.kernel
    while not hasattr(kernel, "cache_key"):  # under autotune or heuristics
        kernel = kernel.fn
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in shipped.constants else shipped.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in shipped.divisible_by_16}
    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = triton.compile(
            ASTSource(kernel, signature, dict(shipped.constants), attributes), target=gpu, options=options
        )
    shared = int(built.metadata.shared)
    if not cuda:
        return read_amdgcn(built.asm["amdgcn"], warps=shipped.num_warps, shared=shared)
    # Warp specialisation adds warps to those asked for.
    threads = re.search(r"\.reqntid\s+(\d+)", built.asm["ptx"])
    return _read_cubin(
        built.asm["cubin"],
        warps=int(threads[1]) // 32 if threads else shipped.num_warps,
        shared=shared,
        tensor_memory=int(getattr(built.metadata, "tmem_size", 0) or 0),
    )


def read_amdgcn(text: str, *, warps: int, shared: int) -> Facts:
    """Facts of AMD's assembly with its metadata."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    return _facts(
        disassembly.main_loop(disassembly.amdgcn(text)),
        warps=warps,
        warp=64,
        registers=number("vgpr_count"),
        spills=4 * number("vgpr_spill_count") + number("private_segment_fixed_size"),
        scalar_spills=number("sgpr_spill_count"),
        shared=shared,
        tensor_memory=0,
    )


_USAGE = re.compile(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Of each function in what `cuobjdump -res-usage` prints: registers, bytes of stack and local memory, of shared."""
    return {name: (int(r), int(stack) + int(local), int(s)) for name, r, stack, s, local in _USAGE.findall(text)}


def _read_cubin(cubin: bytes, *, warps: int, shared: int, tensor_memory: int) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        ((name, (registers, spills, _)),) = usage(_run("cuobjdump", "-res-usage", str(path))).items()
        code = disassembly.sass(_run("nvdisasm", "-c", str(path)), name)
    resources = {"registers": registers, "spills": spills, "shared": shared, "tensor_memory": tensor_memory}
    return _facts(disassembly.main_loop(code), warps=warps, warp=32, **resources)


_THREADS = re.compile(
    r"^\.nv\.info\.(\w+)$|EIATTR_(?:MAX_THREADS|REQNTID)\s*\n.*\n\s*Value:\s*(0x\w+) (0x\w+) (0x\w+)", re.MULTILINE
)


def compile_cuda(source: Path, include: Sequence[Path], target: str) -> Iterator[tuple[str, Facts]]:
    """Compiles a .cu file with nvcc: each kernel's name and facts. Shared memory is what is known when compiling: what
    a launch adds is not in it.

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: it can't be compiled.
    """
    nvcc = tool("nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        arch = target + ("a" if int(target[3:]) >= 90 else "")
        flags = ["-cubin", "-O3", "-std=c++17", f"-arch={arch}", *(f"-I{path}" for path in include)]
        subprocess.run([nvcc, *flags, str(source), "-o", cubin], check=True, capture_output=True, text=True)
        listing, resources = _run("nvdisasm", "-c", cubin), usage(_run("cuobjdump", "-res-usage", cubin))
        threads = block_sizes(_run("cuobjdump", "-elf", cubin))
    for name, (registers, spills, shared) in resources.items():
        code = disassembly.sass(listing, name)
        sizes = {"registers": registers, "spills": spills, "shared": shared, "tensor_memory": 0}
        plain, warps = _plain(name), -(-threads.get(name, 1024) // 32)
        multiplies = plain.startswith(("lstm_step", "lstm_sequence"))
        loop = disassembly.product_loop(code) if multiplies else disassembly.main_loop(code)
        yield plain, _facts(loop, warps=warps, warp=32, **sizes)


def _plain(name: str) -> str:
    """A C++ name without namespaces (an unnamed one carries a hash of the file) and arguments."""
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    text = subprocess.run([filt, name], check=True, capture_output=True, text=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\b\w+::", "", text.split("(")[0])


def block_sizes(text: str) -> Mapping[str, int]:
    """The most threads that each kernel's launch bounds allow, from what `cuobjdump -elf` prints."""
    found: dict[str, int] = {}
    name = ""
    for section, *sizes in _THREADS.findall(text):
        if section:
            name = section
        elif name:
            found[name] = math.prod(int(size, 16) for size in sizes)
    return found


def tool(name: str) -> str:
    """The path of nvcc, cuobjdump or nvdisasm: Triton's own, else the toolkit's. FileNotFoundError: there is none."""
    import triton

    ours = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(ours) if ours.exists() else shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(f"{name} was not found: neither in Triton nor on PATH, nor in /usr/local/cuda/bin")
    return found


def _run(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], check=True, capture_output=True, text=True).stdout
