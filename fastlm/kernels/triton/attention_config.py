"""Tile sizes of the attention kernels: defaults per architecture, so that a first call compiles one kernel.

They are tiles that spill nothing, by `python -m bench gpu-static`, for calls without options, with one and with all.
FASTLM_AUTOTUNE=1 measures instead, once for each kernel, head size and kind of number, the few that are the default of
some architecture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

__all__ = ["CONFIGS", "Config", "architecture", "burden", "run_best", "tiles"]


class Config(NamedTuple):
    """Rows of queries and of keys a block has, and how it is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def blocks(self, names: Sequence[str]) -> dict[str, int]:
        """The sizes among a kernel's arguments."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return {name: size for name, size in sizes.items() if name in names}

    def for_rows(self, rows: int) -> Config:
        """The same with no more rows than there are."""
        return self if rows >= self.block_m else self._replace(block_m=max(16, triton.next_power_of_2(rows)))


_C = Config

# By kernel, bytes of a number, and features of a head up to: 64, 128, 256. "one", "all": see `burden`.
CONFIGS: dict[str, dict[tuple[str, int], tuple[Config, ...]]] = {
    "sm_80": {
        ("forward", 2): (_C(128, 32, 4, 3), _C(128, 64, 8, 3), _C(64, 32, 8, 2)),
        ("grad_key_value", 2): (_C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(16, 64, 8, 1)),
        ("grad_query", 2): (_C(128, 64, 8, 2), _C(128, 32, 8, 2), _C(64, 32, 8, 1)),
        ("forward", 4): (_C(64, 32, 8, 1), _C(32, 16, 8, 1), _C(16, 16, 8, 1)),
        # Registers do not hold the sums of 256 features in float32.
        ("grad_key_value", 4): (_C(32, 16, 8, 1), _C(16, 16, 8, 1)),
        ("grad_query", 4): (_C(32, 32, 8, 1), _C(16, 16, 8, 1)),
        ("forward one", 2): (_C(64, 64, 8, 2), _C(64, 32, 8, 1), _C(32, 32, 8, 1)),
        ("grad_key_value one", 2): (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 16, 8, 2)),
        ("grad_query one", 2): (_C(64, 64, 8, 2), _C(32, 32, 8, 1), _C(32, 32, 8, 1)),
        ("forward all", 2): (_C(64, 64, 8, 1), _C(64, 32, 8, 1), _C(32, 32, 8, 1)),
        ("grad_key_value all", 2): (_C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 16, 8, 2)),
        ("grad_query all", 2): (_C(64, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1)),
        ("forward all", 4): (_C(32, 32, 8, 1), _C(16, 16, 8, 1), _C(16, 16, 8, 1)),
        ("grad_key_value all", 4): (_C(16, 16, 8, 1), _C(16, 16, 8, 3)),
        ("grad_query all", 4): (_C(32, 16, 8, 1), _C(16, 16, 8, 1)),
    },
    "sm_86": {
        ("forward", 2): (_C(128, 32, 4, 3), _C(128, 64, 8, 2), _C(64, 32, 8, 1)),
        ("grad_key_value", 2): (_C(32, 64, 4, 2), _C(32, 64, 8, 2), _C(16, 64, 8, 1)),
    },
    "sm_90": {
        ("forward", 2): (_C(128, 128, 8, 3), _C(128, 128, 8, 2), _C(128, 32, 8, 2)),
        ("grad_key_value", 2): (_C(64, 128, 8, 2), _C(32, 128, 8, 3), _C(32, 32, 8, 2)),
        ("grad_query", 2): (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(64, 32, 8, 2)),
        ("forward", 4): (_C(64, 32, 4, 2), _C(32, 16, 8, 1), _C(16, 16, 8, 1)),
        ("forward one", 2): (_C(128, 64, 8, 2), _C(128, 32, 8, 2), _C(32, 32, 8, 1)),
        ("grad_key_value one", 2): (_C(32, 64, 8, 1), _C(32, 32, 8, 1), _C(16, 16, 8, 2)),
        ("grad_query one", 2): (_C(64, 64, 8, 2), _C(64, 32, 8, 2), _C(32, 32, 8, 1)),
    },
    "sm_100": {
        ("forward", 2): (_C(128, 128, 8, 2), _C(128, 128, 8, 3), _C(128, 32, 8, 2)),
        ("grad_key_value", 2): (_C(64, 128, 8, 2), _C(32, 128, 8, 2), _C(32, 64, 8, 2)),
        ("grad_query", 2): (_C(128, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 32, 8, 2)),
        ("forward", 4): (_C(64, 32, 8, 1), _C(32, 16, 8, 1), _C(16, 16, 4, 1)),
        ("grad_key_value all", 4): (_C(16, 16, 8, 1), _C(16, 16, 8, 2)),
        ("grad_key_value all", 2): (_C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 16, 8, 3)),
    },
    "gfx942": {
        ("forward", 2): (_C(128, 64, 4, 1), _C(128, 64, 4, 1), _C(64, 32, 4, 1)),
        ("grad_key_value", 2): (_C(64, 64, 4, 1), _C(32, 64, 4, 1), _C(16, 32, 4, 1)),
        ("grad_query", 2): (_C(64, 64, 4, 1), _C(64, 32, 4, 1), _C(32, 32, 4, 1)),
        ("grad_key_value all", 4): (_C(16, 16, 8, 1), _C(16, 16, 8, 1)),
        **{
            (f"{kernel} {burden}", 2): configs
            for burden in ("one", "all")
            for kernel, configs in (
                ("forward", (_C(128, 64, 4, 1), _C(128, 64, 4, 1), _C(64, 32, 4, 1))),
                ("grad_key_value", (_C(64, 64, 4, 1), _C(32, 64, 4, 1), _C(16, 32, 4, 1))),
                ("grad_query", (_C(64, 64, 4, 1), _C(64, 32, 4, 1), _C(32, 32, 4, 1))),
            )
        },
    },
}
for _name, _own in CONFIGS.items():
    CONFIGS[_name] = CONFIGS["sm_80"] | _own

_INTERPRETED = Config(32, 16, 4, 1)  # so that short sequences, which is all it has time for, have several blocks
_chosen: dict[Hashable, Config] = {}


@functools.cache
def architecture(device: torch.device) -> str:
    """The entry of CONFIGS for a device: its own, or that of the nearest kin with no more shared memory."""
    if device.type == "cpu":
        return "sm_90"  # in the interpreter
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) == (8, 0) else "sm_86"


def burden(size: int, mask: bool, others: int) -> str:
    """Which tiles a call takes: " one" with one of slopes, dropout and softcap, " all" with several, a mask, or any in
    float32, "" else. What they add to a score takes registers; these tiles hold it."""
    if mask or others > 1 or (others and size == 4):
        return " all"
    return " one" if others else ""


def tiles(target: str, kernel: str, size: int, features: int, burden: str) -> Config:
    """The default of an architecture for numbers of `size` bytes, heads of so many features, and a `burden`."""
    return CONFIGS[target][kernel + burden, size][0 if features <= 64 else 1 if features <= 128 else 2]


def _smaller(config: Config) -> Iterator[Config]:
    """The configuration and, for calls whose options need more shared memory than there is, ever smaller ones."""
    yield config
    while config.num_stages > 1:
        config = config._replace(num_stages=config.num_stages - 1)
        yield config
    while max(config.block_m, config.block_n) > 16:
        config = config._replace(block_m=max(16, config.block_m // 2), block_n=max(16, config.block_n // 2))
        yield config


def _time(run: Callable[[Config], None], config: Config) -> float:
    try:
        return float(triton.testing.do_bench(functools.partial(run, config), warmup=5, rep=20))
    except OutOfResources:  # another architecture has more shared memory
        return float("inf")


def _first(kernel: str, query: Tensor, features: int, burden: str, run: Callable[[Config], None]) -> Config:
    if not query.is_cuda:
        return _INTERPRETED
    call = kernel, query.element_size(), features, burden
    if os.environ.get("FASTLM_AUTOTUNE") != "1":
        return tiles(architecture(query.device), *call)
    return min(dict.fromkeys(tiles(target, *call) for target in CONFIGS), key=functools.partial(_time, run))


def run_best(
    kernel: str, query: Tensor, features: int, burden: str, variant: Hashable, run: Callable[[Config], None]
) -> None:
    """Runs a kernel ("forward", "grad_key_value", "grad_query") in the best known way for such tensors.

    `features` are those of a head, as a power of two; `burden`: see `tiles`; `variant` is what else is compiled into
    the kernel. `run` may be called several times.
    """
    key = (kernel, query.device, query.dtype, features, variant)
    for config in _smaller(_chosen.get(key) or _first(kernel, query, features, burden, run)):
        try:
            run(config)
        except OutOfResources:
            continue
        _chosen[key] = config
        return
    raise RuntimeError(f"attention: no tiles of {kernel} fit this GPU's shared memory")
