"""Memory in huge pages: `fastlm.kernels.cpu.memory`."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastlm.kernels.cpu import memory


def huge_kilobytes(address: int) -> int:
    """Of the mapping that holds an address, what Linux has put into huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            low, _, high = first.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no mapping holds the address")


def test_pieces_are_aligned_apart_and_of_their_own_storage() -> None:
    pieces = [memory.take(size) for size in (1, 63, 64, 65, 0, 5000, memory.ARENA + 1, 7)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, piece in enumerate(pieces):
        assert bool((piece == number).all())
        assert piece.numel() == 0 or piece.data_ptr() % 64 == 0
        assert piece.untyped_storage().nbytes() == piece.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_copy_is_contiguous_and_apart(dtype: torch.dtype) -> None:
    source = torch.randn(5, 7).to(dtype).t()
    copy = memory.in_huge_pages(source)
    assert torch.equal(copy, source) and copy.is_contiguous() and copy.dtype is dtype
    copy += 1
    assert not torch.equal(copy, source)


def test_linux_gives_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not hasattr(mmap, "MADV_HUGEPAGE") or not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system has no transparent huge pages")
    piece = memory.take(2 * memory.ARENA).fill_(1)
    assert huge_kilobytes(piece.data_ptr() + len(piece) // 2) >= 2048


def test_threads_never_share_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ARENA", 1 << 14)
    with ThreadPoolExecutor(8) as pool:
        taken = [t for some in pool.map(lambda _: [memory.take(640) for _ in range(100)], range(8)) for t in some]
    starts = sorted(t.data_ptr() for t in taken)
    assert all(b - a >= 640 for a, b in pairwise(starts))


def test_collapsing_keeps_contents_and_addresses() -> None:
    sizes = (0, 1, 5000, 3 << 20, 40 << 20)
    tensors = [torch.arange(size, dtype=torch.int32).view(torch.float32) for size in sizes]
    before = [(t.data_ptr(), t.clone()) for t in tensors]
    memory.collapse([*tensors, torch.empty(4, device="meta")])
    for tensor, (address, content) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == address and torch.equal(tensor.view(torch.int32), content.view(torch.int32))


def test_collapsing_makes_huge_pages() -> None:
    release = Path("/proc/sys/kernel/osrelease")
    if not release.exists() or tuple(map(int, release.read_text().split(".")[:2])) < (6, 1):
        pytest.skip("MADV_COLLAPSE came with Linux 6.1")
    mapping = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8).fill_(3)
    middle = tensor.data_ptr() + len(tensor) // 2
    assert huge_kilobytes(middle) == 0
    mapping.madvise(mmap.MADV_HUGEPAGE)  # what is there stays as it is
    memory.collapse([tensor])
    if huge_kilobytes(middle) == 0:
        pytest.skip("this kernel gives no huge pages")
    assert huge_kilobytes(middle) >= 32 << 10 and bool((tensor == 3).all())
