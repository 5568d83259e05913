"""`fastlm train` and `fastlm eval` on real text: what they leave behind, how they go on, what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlm.checkpoints import load
from fastlm.data import Tokenizer
from fastlm.evaluation import evaluate
from fastlm.training import read_log, resume

Command = Callable[..., Any]
SMALL = (
    *("--layers", "1", "--width", "16", "--steps", "12", "--batch-size", "4", "--block", "16", "--tokenizer", "byte"),
    *("--eval-interval", "4", "--eval-batches", "2", "--precision", "float32"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"The {i % 7}th of {i % 11} small lines, as simple as the {i % 3} before.\n" for i in range(120))
    )
    return path


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r.get("loss", r.get("valid_loss"))) for r in read_log(run / "log.jsonl")]


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_train_leaves_a_model_a_curve_and_a_comparison(
    fastlm_command: Command, tmp_path: Path, text: Path, model: str
) -> None:
    run = tmp_path / "run"
    outcome = fastlm_command("train", "--data", str(text), "--model", model, "--out", str(run), *SMALL)
    assert outcome.code == 0, outcome.err
    assert [step for step, _ in _losses(run)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["reason"]) == (12, "max_steps")
    assert f"{result['model']['perplexity']:.2f}" in outcome.out
    assert f"{result['ngram']['perplexity']:.2f}" in outcome.out and "5-gram" in outcome.out
    assert 1 < result["ngram"]["perplexity"] < 10, "an n-gram model finds this text easy"
    for told in ("parameters", "12 steps", "held out", f"fastlm generate -m {run}"):
        assert told in outcome.err
    loaded = load(run)
    assert loaded.tokenizer is not None and loaded.tokenizer.kind == "byte"


def test_resume_goes_on_where_it_stopped(fastlm_command: Command, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    arguments = ("train", "--data", str(text), "--model", "lstm", "--out", str(run), *SMALL)
    nothing = fastlm_command("train", "--out", str(run), "--resume")
    assert nothing.code == 2 and "--data" in nothing.err
    assert fastlm_command(*arguments, "--resume").code == 0, "nothing to resume: it starts"
    again = fastlm_command(*arguments)
    assert again.code == 1 and "already holds a run; add --resume" in again.err
    other = fastlm_command("train", "--out", str(run), "--resume", "--model", "gru")
    assert other.code == 1 and "--model: 'gru', expected 'lstm'" in other.err
    longer = fastlm_command("train", "--out", str(run), "--resume", "--steps", "16")
    assert longer.code == 0, longer.err
    assert "resumed at step 12" in longer.err
    assert [step for step, _ in _losses(run)][-5:] == [13, 14, 15, 16, 16]


def test_a_configuration_file_and_standard_options(fastlm_command: Command, tmp_path: Path, text: Path) -> None:
    config = {"architecture": "llama", "context_length": 32, "num_layers": 1, "num_heads": 2, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    arguments = ("train", "--data", str(text), "--model", str(tmp_path / "config.json"), "--tokenizer", "char")
    options = ("--steps", "4", "--batch-size", "2", "--optimizer", "sgd", "--momentum", "0.5", "--lr", "0.1")
    outcome = fastlm_command(*arguments, *options, "--schedule", "linear", "--out", str(tmp_path / "run"))
    assert outcome.code == 0, outcome.err
    assert type(load(tmp_path / "run").model).__name__ == "Llama"
    meta = resume.read(resume.checkpoints(tmp_path / "run")[-1]).meta
    assert (meta["config"]["optimizer"], meta["config"]["momentum"]) == ("sgd", 0.5)


def test_ctrl_c_exits_130_and_the_run_goes_on_to_the_same_losses(
    fastlm_command: Command, tmp_path: Path, text: Path
) -> None:
    """In a process of its own, as a terminal does it."""
    options = ("train", "--data", str(text), "--model", "lstm", *SMALL, "--eval-interval", "1000", "--steps", "100000")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlm.cli.main", *options, "--schedule", "constant", "--out", str(tmp_path / "a")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "a" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"fastlm train --out {tmp_path / 'a'} --resume" in told.replace("\n", "")
    assert "Traceback" not in told
    stopped = resume.read(resume.checkpoints(tmp_path / "a")[-1]).step
    assert stopped >= 1
    last = str(stopped + 10)
    assert fastlm_command("train", "--out", str(tmp_path / "a"), "--resume", "--steps", last).code == 0
    outcome = fastlm_command(*options[:-1], last, "--schedule", "constant", "--out", str(tmp_path / "b"))
    assert outcome.code == 0, outcome.err
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--data"),
        (("--preset", "huge"), 2, "huge"),
        (("--model", "transformer"), 1, "model: 'transformer'"),
        (("--lr", "-1"), 1, "learning_rate: -1.0"),
        (("--lr", "nan"), 1, "learning_rate: nan"),
        (("--accumulate", "3"), 1, "accumulation: 3"),
        (("--block", "4096"), 1, "block_length: 4096"),
        (("--device", "abacus"), 1, "device: 'abacus'"),
        (("--heads", "3"), 1, "heads: 3"),
    ],
)
def test_errors_name_the_option(
    fastlm_command: Command, tmp_path: Path, text: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    data = ("--data", str(text), "--tokenizer", "byte") if options else ()
    outcome = fastlm_command("train", *data, *options, "--out", str(tmp_path / "run"))
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""


@pytest.mark.parametrize("content", ["", "too short"])
def test_text_without_enough_in_it(fastlm_command: Command, tmp_path: Path, content: str) -> None:
    path = tmp_path / "little.txt"
    path.write_text(content)
    outcome = fastlm_command("train", "--data", str(path), "--tokenizer", "byte", "--out", str(tmp_path / "run"))
    assert outcome.code == 1
    assert ("little.txt: empty" if not content else "tokens") in outcome.err
    assert not resume.checkpoints(tmp_path / "run")


def test_a_run_folder_that_cannot_be_made(fastlm_command: Command, tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = fastlm_command("train", "--data", str(text), "--out", str(tmp_path / "file" / "run"))
    assert outcome.code == 1
    assert str(tmp_path / "file") in outcome.err.replace("\n", "")


def test_eval_prints_what_evaluate_finds(fastlm_command: Command, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    assert fastlm_command("train", "--data", str(text), "--out", str(run), *SMALL, "--heads", "2").code == 0
    outcome = fastlm_command("eval", "-m", str(run), "--data", str(text), "--json", "--stride", "100")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    checkpoint = load(run)
    ids = Tokenizer.byte().encode(text.read_text())
    expected = evaluate(checkpoint.model, ids, stride=100, byte_count=len(ids) - 1)
    assert told["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert told["bits_per_byte"] == pytest.approx(expected.loss / 0.6931471805599453, rel=1e-9)
    assert (told["tokens"], told["bytes"]) == (len(ids) - 1, len(ids) - 1)
    plain = fastlm_command("eval", "-m", str(run), "--data", str(text), "--stride", "100")
    assert f"{expected.perplexity:.4f}" in plain.out
    part = json.loads(fastlm_command("eval", "-m", str(run), "--data", str(text), "--max-tokens", "50", "--json").out)
    assert (part["tokens"], part["bytes"]) == (49, 49)


def test_eval_refuses_empty_text(fastlm_command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    outcome = fastlm_command("eval", "-m", "nothing", "--data", str(tmp_path / "empty.txt"))
    assert outcome.code == 1 and "empty.txt: empty" in outcome.err
