"""A write that fails or is killed leaves the previous file whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastlm.checkpoints.atomic import save_tensors_atomic, write_atomic, write_json_atomic
from fastlm.checkpoints.errors import CheckpointError


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).T, "b": torch.arange(4), "c": torch.randn(2).bfloat16(), "d": torch.zeros(0)}
    path = tmp_path / "deep" / "x.safetensors"
    save_tensors_atomic(path, tensors, {"step": "3"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "3"}
    write_json_atomic(tmp_path / "x.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ü": [1, None]}


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors_atomic(path, {"a": torch.ones(8)})
    with disk_of(1 << 16), pytest.raises(CheckpointError, match=r"x\.safetensors: could not be written.*unchanged"):
        save_tensors_atomic(path, {"a": torch.zeros(1 << 20)})
    with disk_of(1 << 10), pytest.raises(CheckpointError, match=r"y\.json: could not be written.*nothing was written"):
        write_json_atomic(tmp_path / "y.json", list(range(1000)))
    assert torch.equal(load_file(path)["a"], torch.ones(8))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_kill_never_loses_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = (
        "import sys, torch\n"
        "from fastlm.checkpoints.atomic import save_tensors_atomic\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    save_tensors_atomic(sys.argv[1], {'a': torch.full((1 << 18,), float(n))}, {'n': str(n)})\n"
    )
    seen = 0
    for extra in (0.0, 0.013, 0.029):
        process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
        before = path.stat().st_ino if path.exists() else None
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_ino == before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        time.sleep(extra)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with safe_open(path, "pt") as file:
            n = int(file.metadata()["n"])
        assert torch.equal(load_file(path)["a"], torch.full((1 << 18,), float(n)))
        seen += n
    assert seen >= 3
