"""The benchmark's own promises: a red gate prints no figure, a missing peer is a row, a slow-down is found."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as program
from bench import measure, regression, report
from bench.case import Case, GateFailed
from bench.worker import OURS, EngineError, Pool, Task, Worker

_FAKE_ENGINE = """
import os, time
class Engine:
    def __init__(self, model, threads, greeting="hello"):
        if model.endswith("missing"):
            raise ValueError(f"{model} can't be loaded")
        self.words, self.threads = greeting, threads
    def generate(self, *args):
        return [self.words, self.threads, *args]
    def noise(self):
        os.write(1, b"native libraries print where they like")
        print("and so does Python")
        return "answer"
    def hold(self, megabytes):
        return len(b"x" * (megabytes << 20))
    def about(self):
        return "a fake"
    def refuse(self):
        raise RuntimeError("not that")
    def crash(self):
        os.abort()
    def sleep(self):
        time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that needs nothing."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "engine.py").write_text(_FAKE_ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fakes.engine"


def case(ours: Callable[[], object], peer: Callable[[], object], gate: Callable[[], str | None], **more: Any) -> Case:
    return Case(name="work", shape="one", peer_name="peer", gate=gate, ours=ours, peer=peer, **{"seconds": 0.01} | more)


def busy(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


# Workers


def test_worker_answers_whatever_the_engine_prints(fake: str, tmp_path: Path) -> None:
    with Pool(3) as pool:
        worker = pool.get(fake, tmp_path, greeting="hi")
        assert worker.call("noise") == "answer"
        assert Task(pool, fake, tmp_path, "generate", (1, [2]), {"greeting": "hi"})() == ["hi", 3, 1, [2]]
        assert pool.get(fake, tmp_path, greeting="hi") is worker
        assert pool.get(fake, tmp_path) is not worker


def test_worker_reports_the_exception_and_goes_on(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        worker = pool.get(fake, tmp_path)
        with pytest.raises(EngineError, match="RuntimeError: not that"):
            worker.call("refuse")
        assert worker.call("noise") == "answer"


def test_worker_survives_the_engine_s_death(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        worker = pool.get(fake, tmp_path)
        with pytest.raises(EngineError, match="SIGABRT"):
            worker.call("crash")
        with pytest.raises(EngineError, match="died"):
            worker.call("noise")


def test_worker_does_not_wait_forever(fake: str, tmp_path: Path) -> None:
    worker = Worker(fake, tmp_path, threads=1, timeout=5)
    worker._timeout = 0.2
    with pytest.raises(EngineError, match="no answer within"):
        worker.call("sleep")
    worker.close()


def test_model_that_can_t_be_loaded(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        for _ in range(2):
            with pytest.raises(EngineError, match="missing can't be loaded"):
                pool.get(fake, tmp_path / "missing")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_of_a_call_is_that_call_s(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        small, large = (Task(pool, fake, tmp_path, "hold", (size,)) for size in (1, 200))
        peaks = []
        for task in (large, small):
            assert task.forget_peak()
            task()
            peaks.append(task.peak_bytes())
        assert peaks[0] > 200 << 20
        assert peaks[1] < peaks[0] - (150 << 20), "an earlier peak was reported again"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_row_has_the_engine_s_memory(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        ours, peer = (Task(pool, fake, tmp_path, "hold", (size,), {"greeting": str(size)}) for size in (1, 200))
        row = program.run_case(case(ours, peer, lambda: None, pairs=2))
    assert row["peer_bytes"] > row["ours_bytes"] + (150 << 20)
    assert row["peer_about"] == "a fake"


# Rows


def test_red_gate_prints_no_figure() -> None:
    calls: list[str] = []

    def gate() -> None:
        raise GateFailed("the sky is green")

    row = program.run_case(case(lambda: calls.append("ours"), lambda: calls.append("peer"), gate))
    assert row["status"] == "gate failed"
    assert calls == []
    assert not {"ours", "peer", "ratio"} & set(row)
    assert "the sky is green" in report.line(row) and "×" not in report.line(row)


def test_missing_peer_is_a_row(tmp_path: Path) -> None:
    with Pool(1) as pool:
        row = program.run_case(case(busy(0), Task(pool, "no_such_engine", tmp_path, "generate", ()), lambda: None))
    assert row["status"] == "peer unavailable"
    assert "No module named" in row["reason"] and "no_such_engine" in report.line(row) and "×" not in report.line(row)


def test_crashing_peer_is_a_row(fake: str, tmp_path: Path) -> None:
    with Pool(1) as pool:
        row = program.run_case(case(busy(0), Task(pool, fake, tmp_path, "crash", ()), lambda: None))
    assert row["status"] == "peer unavailable" and "SIGABRT" in row["reason"]


def test_a_peer_without_its_model_is_a_row(fake: str) -> None:
    def convert() -> Path:
        raise ModuleNotFoundError("No module named 'converter'")

    with Pool(1) as pool:
        row = program.run_case(case(busy(0), Task(pool, fake, convert, "generate", ()), lambda: None))
    assert row["status"] == "peer unavailable" and "converter" in row["reason"]


def test_ours_that_crashes_is_a_failure(tmp_path: Path) -> None:
    with Pool(1) as pool:
        row = program.run_case(case(Task(pool, OURS, tmp_path / "nowhere", "generate", ()), busy(0), lambda: None))
    assert row["status"] == "gate failed" and "nowhere" in row["reason"]


def test_figures_of_a_row() -> None:
    row = program.run_case(
        case(busy(0.004), busy(0.012), lambda: "checked", work=8, unit="tokens", moved=4e6, flops=8e6, pairs=3)
    )
    assert row["status"] == "measured" and row["gate"] == "checked"
    assert 1.5 < row["ratio"] < 4 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ours_bytes_per_s"] == pytest.approx(4e6 / row["ours"])
    assert row["flop_per_byte"] == 2
    assert row["ours_shown"] == f"{8 / row['ours']:,.1f} tokens/s"
    assert 0 < row["ours_of_ceiling"] < 1
    assert report.table([row]).count("\n") == 2 and "**" in report.line(row)


def test_returned_figures_are_not_timed() -> None:
    row = program.run_case(case(lambda: 2e9, lambda: 5e9, lambda: None, unit="bytes", pairs=1))
    assert (row["ours"], row["peer"], row["ratio"]) == (2e9, 5e9, 2.5)
    assert row["ours_shown"] == "2.00 GB"


def test_turns_alternate() -> None:
    order: list[str] = []
    measure.compare(lambda: order.append("o"), lambda: order.append("p"), pairs=4, seconds=0)
    assert "".join(order).endswith("oppooppo")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_growth_of_this_process() -> None:
    size = 64 << 20
    grown = measure.grown_bytes(lambda: torch.ones(size // 4))
    assert grown is not None and 0.9 * size < grown < 1.5 * size


def test_every_listed_group_has_its_file() -> None:
    for modules in (*program._SUITES.values(), *program._LONG.values()):
        for module in modules:
            assert importlib.util.find_spec(f"bench.cases.{module}"), module


# Regressions


def record(*rows: dict[str, Any], processor: str = "X") -> dict[str, Any]:
    return {"machine": {"processor": processor, "isa": "avx2", "threads": 2}, "rows": list(rows)}


def row(ratio: float, spread: float = 0.02, **more: Any) -> dict[str, Any]:
    low, high = ratio * (1 - spread), ratio * (1 + spread)
    start = {"case": "c", "shape": "s", "against": "a", "status": "measured"}
    return start | {"ratio": ratio, "ratio_low": low, "ratio_high": high} | more


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (row(2.0), row(1.5), True),
        (row(2.0), row(2.5), False),
        (row(2.0), row(1.95), False),  # within the spread
        (row(2.0, 0.001), row(1.96, 0.001), False),  # apart, but by less than two runs differ
        (row(2.0, 0.3), row(1.5, 0.3), False),  # the halves meet
        (row(2.0), row(1.0, status="gate failed", reason="wrong"), True),
        (row(2.0), row(1.0, status="peer unavailable", reason="gone"), False),
        (row(2.0), row(1.0, shape="another"), False),
        (row(2.0, status="gate failed"), row(1.0), False),  # it had no figure to fall from
    ],
)
def test_regressions(before: dict[str, Any], now: dict[str, Any], found: bool) -> None:
    assert bool(regression.regressions(record(before), record(now))) == found


def test_other_machines_are_not_compared() -> None:
    assert regression.regressions(record(row(2.0)), record(row(1.0), processor="Y")) == []


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A suite of one case, whose `ours` a test can slow down and whose gate it can turn red."""
    module = types.ModuleType("bench.cases.planted")
    module.ours, module.gate = busy(0.002), lambda: None  # type: ignore[attr-defined]

    def cases() -> Iterator[Case]:
        yield case(lambda: module.ours(), busy(0.02), lambda: module.gate(), moved=1e6, flops=1e6)

    module.cases = cases  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.cases.planted", module)
    monkeypatch.setitem(program._SUITES, "planted", ("planted",))
    yield module


def test_exit_codes(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "planted", "--out", str(tmp_path)])
    assert program.main() == 0
    (kept,) = tmp_path.glob("*.json")
    first = json.loads(kept.read_text())
    assert {"versions", "machine", "environment", "time", "command"} <= set(first)
    assert first["rows"][0]["command"].startswith("python -m bench planted --only planted")
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    planted.ours = busy(0.01)
    assert program.main() == 2
    assert "WORSE" in capsys.readouterr().out

    def red() -> None:
        raise GateFailed("wrong")

    planted.gate = red
    assert program.main() == 1


def test_part_of_a_suite_leaves_the_whole_s_result(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "planted", "--only", "planted", "--quick", "--out", str(tmp_path)])
    assert program.main() == 0
    (kept,) = tmp_path.glob("*.json")
    assert kept.stem.endswith("-planted-quick")
    monkeypatch.setattr(sys, "argv", ["bench", "planted", "--only", "nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nothing"):
        program.main()
