"""The commands around a model: results on stdout, errors by name on stderr, exit codes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.checkpoints.run import save_run
from fastlm.data.tokenizer import Tokenizer
from fastlm.models.gpt import GPT, GPTConfig

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT over bytes, as `fastlm train` would leave it."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.byte()
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, context_length=64, num_layers=1, num_heads=2, hidden_size=16, dropout=0.0
    )
    folder = tmp_path_factory.mktemp("runs") / "random"
    save_run(GPT(config), folder, tokenizer)
    return folder


def test_help_names_every_command(fastlm_command: Command) -> None:
    outcome = fastlm_command("--help")
    assert outcome.code == 0
    for name in ("demo", "train", "generate", "chat", "eval", "pull", "quantize", "info"):
        assert name in outcome.out
        assert fastlm_command(name, "--help").code == 0


def test_info_is_complete_and_machine_readable(fastlm_command: Command) -> None:
    facts = json.loads(fastlm_command("info", "--json").out)
    assert facts["isa"]["active"] in facts["isa"]["runs here"]
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
    assert "reference" in facts["ops"]["lstm"]
    shown = fastlm_command("info").out
    assert "avx2" in shown or "baseline" in shown
    assert "_cuda" in shown


def test_generate_is_reproducible_and_streams_the_same_text(fastlm_command: Command, run_folder: Path) -> None:
    arguments = ("generate", "-m", str(run_folder), "ab", "--max-new-tokens", "20", "--seed", "4")
    streamed, whole = fastlm_command(*arguments), fastlm_command(*arguments, "--no-stream")
    assert streamed.code == whole.code == 0, streamed.err
    assert streamed.out == whole.out
    assert fastlm_command(*arguments[:-1], "5").out != whole.out


def test_generate_n_gives_n_different_continuations(fastlm_command: Command, run_folder: Path) -> None:
    outcome = fastlm_command("generate", "-m", str(run_folder), "ab", "-t", "12", "--n", "3", "--seed", "1")
    assert outcome.code == 0
    assert "--- 3 of 3, seed 1, ended by length" in outcome.err


def test_generate_reads_stdin_and_files(
    fastlm_command: Command, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-m", str(run_folder), "-t", "8", "--seed", "1")
    want = fastlm_command("generate", "xyz", *options).out
    file = tmp_path / "prompt.txt"
    file.write_text("xyz")
    assert fastlm_command("generate", "--file", str(file), *options).out == want
    monkeypatch.setattr(sys, "stdin", io.StringIO("xyz"))
    assert fastlm_command("generate", "-", *options).out == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-m", "no-such-model", "x"), "no-such-model"),
        (("generate", "-m", "RUN", "x", "--top-p", "1.5"), "top_p: 1.5"),
        (("generate", "-m", "RUN", "x", "--temperature", "-1"), "temperature: -1.0"),
        (("generate", "-m", "RUN", ""), "empty"),
        (("generate", "-m", "RUN", "x" * 65), "65 tokens"),
        (("pull", "smollm2-135"), "smollm2-135m"),
        (("chat", "-m", "RUN"), "chat template"),
        (("eval", "-m", "RUN", "--data", "no-such-file.txt"), "no-such-file.txt"),
        (("train", "--data", "no-such-file.txt", "--out", "TMP"), "no-such-file.txt"),
    ],
)
def test_errors_name_the_culprit(
    fastlm_command: Command, run_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"RUN": str(run_folder), "TMP": str(tmp_path / "out")}
    outcome = fastlm_command(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_usage_errors_exit_2(fastlm_command: Command) -> None:
    assert fastlm_command("generate", "--no-such-option").code == 2
    assert fastlm_command("no-such-command").code == 2


def test_a_damaged_run_is_an_error(fastlm_command: Command, run_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    outcome = fastlm_command("generate", "-m", str(broken), "x")
    assert outcome.code == 1
    assert "model.safetensors" in outcome.err


def test_interrupting_a_stream_exits_130(
    fastlm_command: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlm.generation import Decoder

    def interrupted(self: Decoder) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "step", interrupted)
    assert fastlm_command("generate", "-m", str(run_folder), "x").code == 130


def test_demo_does_not_touch_a_folder_that_is_not_its_own(fastlm_command: Command, tmp_path: Path) -> None:
    (tmp_path / "lstm").mkdir()
    (tmp_path / "lstm" / "precious.txt").write_text("keep")
    outcome = fastlm_command("demo", "--out", str(tmp_path))
    assert outcome.code == 1
    assert (tmp_path / "lstm" / "precious.txt").read_text() == "keep"


def test_quantize_prints_both_perplexities(fastlm_command: Command, tmp_path: Path) -> None:
    from gguf_files import llama, write

    source, target = write(tmp_path / "a.gguf", llama(), tokenizer=True), tmp_path / "b.gguf"
    (tmp_path / "text.txt").write_text("the other day in the north " * 20)
    options = ("--kind", "Q4_1", "--data", str(tmp_path / "text.txt"), "--max-tokens", "200")
    outcome = fastlm_command("quantize", str(source), str(target), *options)
    assert outcome.code == 0, outcome.err
    before, after = outcome.out.splitlines()
    sizes, perplexities = zip(
        *((float(line.split()[1]), float(line.split()[-1])) for line in (before, after)), strict=True
    )
    assert sizes[1] < sizes[0] and target.stat().st_size < source.stat().st_size / 2
    assert perplexities[0] != perplexities[1]
    assert fastlm_command("quantize", str(source), str(source)).code == 1
