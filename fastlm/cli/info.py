"""`fastlm info`: what this installation has and uses, and why not the rest."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from fastlm.cli.common import console

__all__ = ["collect", "info"]

_PACKAGES = ("torch", "triton", "tokenizers", "safetensors", "gguf", "numpy", "transformers")


def collect() -> dict[str, Any]:
    """Versions, processor, threads, native modules and the implementations of each op."""
    import torch

    from fastlm import __version__
    from fastlm.kernels import cuda, native
    from fastlm.ops import registry

    versions = {"fastlm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    module = native.CPU.module
    return {
        "versions": versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "threads": native.num_threads(),
        },
        "modules": {
            "_native": native.CPU.error or "loaded",
            "_cuda": native.CUDA.error or "loaded",
            "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        },
        "backends": {
            "cpu": native.CPU.error or "available",
            "cuda": cuda.unavailable(torch.device("cuda")) or "available",
            "torch": "available",
            "reference": "available",
        },
        "isa": {
            "active": module.isa_active() if module else None,
            "runs here": list(module.isa_available()) if module else [],
            "compiled": list(module.isa_compiled()) if module else [],
        },
        "ops": {name: [i.name for i in op.implementations] for name, op in sorted(registry.all_ops().items())},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, instruction-set levels, threads, and which implementations each op has here, and why not more."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    for title, values in facts.items():
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for key, value in values.items():
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(f"  {key}", shown or "-")
        console.print(f"[bold]{title}[/]")
        console.print(table)
    console.print("An op takes the first implementation that can run the call; FASTLM_ISA=avx2 forces a level.")
