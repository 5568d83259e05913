"""The cases of `bench gpu` at tiny sizes: their gates, their peers, and the clock that waits for a device."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import __main__ as program
from bench import measure
from bench.case import Case, GateFailed
from bench.gpu import live
from bench.worker import EngineError
from fastlm.kernels import cuda

MODULES = program._SUITES["gpu"]
# Peers that only run on a GPU, or need a package that CI does not install, or a model.
ABSENT = {"SDPA cuDNN", "SDPA efficient", "flash-attn", "FlashInfer", "Liger", "transformers"}


@pytest.fixture(autouse=True)
def one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_QUICK_PAIRS", 1)
    monkeypatch.setattr(measure, "read_bandwidth", lambda nbytes=1e9: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda: 1e12)
    monkeypatch.setattr(measure, "grown_bytes", lambda function: 0)


def _cases(module: str, device: str) -> Iterator[Case]:
    for case in importlib.import_module(f"bench.cases.{module}").cases(device, small=True):
        yield dataclasses.replace(case, seconds=0)  # one call a turn


@pytest.mark.parametrize("module", MODULES)
def test_each_case_runs_at_a_tiny_size(module: str) -> None:
    peers = set()
    for case in _cases(module, "cpu"):
        row = program.run_case(case, quick=True)
        assert row["status"] == "measured" or case.peer_name in ABSENT, row
        assert row["status"] != "gate failed", row
        peers.add((row["status"], case.peer_name))
    assert any(status == "measured" for status, _ in peers)


@pytest.mark.gpu
@pytest.mark.parametrize("module", MODULES)
def test_each_case_on_a_device(module: str) -> None:
    for case in _cases(module, "cuda"):
        row = program.run_case(case, quick=True)
        assert row["status"] in ("measured", "peer unavailable"), row


def _gate(error: float) -> str:
    exact = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    ours = exact + error * torch.cos(exact * 1e4)
    return live.gate(lambda: ours, lambda: exact.bfloat16(), lambda: exact)()


def test_the_gate_lets_through_what_is_as_good_as_torch_and_nothing_else() -> None:
    assert "of the bound" in _gate(1e-3)
    with pytest.raises(GateFailed, match="error"):
        _gate(0.05)
    with pytest.raises(GateFailed, match="error"):
        live.gate(lambda: torch.zeros(3), lambda: torch.ones(3), lambda: torch.ones(3))()
    with pytest.raises(GateFailed, match="RuntimeError: no kernel"):
        live.gate(_fails, lambda: torch.ones(3), lambda: torch.ones(3))()


def _fails() -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this")


def test_not_a_number_does_not_pass() -> None:
    with pytest.raises(GateFailed, match="nan"):
        live.gate(lambda: torch.tensor([torch.nan]), lambda: torch.ones(1), lambda: torch.ones(1))()


def test_a_peer_that_cannot_says_so() -> None:
    with pytest.raises(EngineError, match="them: RuntimeError: no kernel"):
        live.peer("them", _fails)()


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of which a call costs nothing and the work takes a second of a clock that only waiting moves."""
    now, queued = [0.0], [0.0]

    def wait() -> None:
        now[0] += queued[0]
        queued[0] = 0.0

    def work(seconds: float) -> None:
        queued[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    found = measure.compare(lambda: work(0.5), lambda: work(1.5), pairs=2, seconds=3.0, wait=wait)
    assert (found.ours, found.peer, found.ratio) == (0.5, 1.5, 3.0)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu"])
    assert program.main() == 3
    assert "finds no GPU" in capsys.readouterr().err


def test_the_record_names_the_gpu_and_its_ceilings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ceilings = {"read_bytes_per_s": 3e12, "flop_per_s": 8e14}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(cuda, "_device_error", lambda module, device: None)  # which would ask it
    monkeypatch.setattr(program, "_device_ceilings", lambda device: ceilings)
    monkeypatch.setattr(program, "_SUITES", {"gpu": ("gpu_recurrent",)})
    module = importlib.import_module("bench.cases.gpu_recurrent")
    small = list(_cases("gpu_recurrent", "cpu"))
    monkeypatch.setattr(module, "cases", lambda: small)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--quick", "--out", str(tmp_path)])
    assert program.main() == 0
    assert "A GPU" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.json")] == ["gpu-x86_64-sm_90-quick.json"]
