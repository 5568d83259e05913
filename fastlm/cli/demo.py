"""`fastlm demo`: the whole of fastlm in one command, on text that every Python has with it."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.cli.common import console

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.data.tokenizer import Tokenizer
    from fastlm.generation import LanguageModel
    from fastlm.models.base import ModelConfig

__all__ = ["demo"]

_VOCABULARY = 1024
_PROMPT = "The "


@dataclass
class _Trained:
    name: str
    parameters: int
    seconds: float
    perplexity: float
    bits_per_byte: float


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the trained models and the picture.")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(min=5, help="Training time of each model at the most.")] = 45,
    seed: Annotated[int, typer.Option(help="Same seed, same steps, same text.")] = 1,
) -> None:
    """Train a small LSTM and a small GPT on Python's own documentation, compare them, and let them write.

    Everything is measured as it runs: an n-gram model, the LSTM and the GPT see the same text and are judged on the
    same held-out tenth of it; then the native kernels race the plain PyTorch reference on the trained weights.
    """
    import torch
    from rich.table import Table

    import fastlm
    from fastlm.data.corpora import corpus
    from fastlm.data.tokenizer import Tokenizer
    from fastlm.evaluation import evaluate
    from fastlm.models.gpt import GPTConfig
    from fastlm.models.ngram import NGramLM
    from fastlm.models.recurrent import RecurrentConfig
    from fastlm.training import plot_losses

    _claim(out)
    text = "\n".join(corpus("topics"))
    cut = text.rindex("\n", 0, len(text) * 9 // 10) + 1
    _step(1, "Text", f"{len(text):,} characters of Python's language reference; the last tenth is held out")
    tokenizer = Tokenizer.train_bpe([text[:cut]], vocab_size=_VOCABULARY)
    train, held_out = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    held_out_bytes = len(text[cut:].encode())
    console.print(
        f"  byte-level BPE of {tokenizer.vocab_size:,} tokens: {len(train):,} to train on, {len(held_out):,} held out"
    )

    _step(2, "Baseline", "an interpolated Kneser-Ney 5-gram model")
    start = time.perf_counter()
    ngram = NGramLM(order=5, vocab_size=tokenizer.vocab_size).fit(train)
    fitted = time.perf_counter() - start
    result = evaluate(ngram, held_out, byte_count=held_out_bytes)
    rows = [_Trained("5-gram", 0, fitted, result.perplexity, result.bits_per_byte or 0.0)]
    console.print(f"  fitted in {fitted:.1f} s; held-out perplexity {result.perplexity:.1f}")

    configs: dict[str, ModelConfig] = {
        "LSTM": RecurrentConfig(
            vocab_size=tokenizer.vocab_size,
            embedding_size=192,
            hidden_size=256,
            num_layers=2,
            embedding_dropout=0.05,
            input_dropout=0.1,
            hidden_dropout=0.1,
            output_dropout=0.1,
        ),
        "GPT": GPTConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=128,
            num_layers=4,
            num_heads=4,
            hidden_size=128,
            dropout=0.05,
        ),
    }
    for number, (name, config) in enumerate(configs.items(), start=3):
        rows.append(
            _train(number, name, config, train, held_out, tokenizer, held_out_bytes, out / name.lower(), seconds, seed)
        )

    _step(5, "Comparison", "on the held-out text, each token scored once")
    table = Table("model", "parameters", "training", "perplexity", "bits per byte", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters:,}" if row.parameters else "-",
            f"{row.seconds:.0f} s",
            f"{row.perplexity:.1f}",
            f"{row.bits_per_byte:.3f}",
        )
    console.print(table)
    picture = out / "loss.png"
    plot_losses({name: out / name.lower() for name in configs}, picture, baselines={"5-gram, held out": result.loss})
    console.print(f"  curves: {picture}", soft_wrap=True)

    _step(6, "Text", f"each model continues {_PROMPT!r}, temperature 0.8")
    models = {name: fastlm.load(out / name.lower()) for name in configs}
    for name, model in models.items():
        console.print(f"\n  [bold]{name}:[/] ", end="")
        sys.stdout.write(_PROMPT)
        for piece in model.stream(_PROMPT, max_new_tokens=80, temperature=0.8, top_p=0.95, seed=seed):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")

    _step(7, "Kernels", "native against the plain PyTorch reference: same weights, same inputs, same results")
    _race(models, seed)
    console.print(
        f"\nTry: [bold]fastlm generate -m {out / 'gpt'} 'The'[/], [bold]fastlm train --help[/], or a pretrained model: "
        "[bold]fastlm generate -m smollm2-135m 'The capital of France is'[/]",
        soft_wrap=True,
    )


def _claim(out: Path) -> None:
    """Makes `out` the demo's own. A demonstration starts over each time, but never in somebody else's folder."""
    marker = out / ".fastlm-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"--out: {out} is not empty and not an earlier demo's; give another folder")
    for name in ("lstm", "gpt"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _step(number: int, title: str, detail: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/]: {detail}", soft_wrap=True)


def _train(
    number: int,
    name: str,
    config: ModelConfig,
    train: Tensor,
    held_out: Tensor,
    tokenizer: Tokenizer,
    held_out_bytes: int,
    folder: Path,
    seconds: float,
    seed: int,
) -> _Trained:
    from fastlm import models
    from fastlm.evaluation import evaluate
    from fastlm.training import ProgressBar, Trainer, TrainingConfig

    model = models.build(config.to_dict() | {"architecture": config.architecture})
    parameters = sum(p.numel() for p in model.parameters())
    _step(number, f"Training the {name}", f"{parameters:,} parameters, at most {seconds:.0f} s")
    recurrent = config.context_length is None
    trainer = Trainer(
        model,
        train,
        held_out,
        TrainingConfig(
            learning_rate=3e-3 if recurrent else 2e-3,
            warmup_steps=50,
            batch_size=16,
            block_length=64 if recurrent else 128,
            max_steps=1000 if recurrent else 600,
            time_limit=seconds,
            eval_interval=200,
            eval_batches=10,
            seed=seed,
        ),
        folder,
        [ProgressBar(console, label=name)],
        tokenizer=tokenizer,
    )
    outcome = trainer.train()
    result = evaluate(trainer.model, held_out, byte_count=held_out_bytes)
    return _Trained(name, parameters, outcome.seconds, result.perplexity, result.bits_per_byte or 0.0)


def _race(language_models: dict[str, LanguageModel], seed: int) -> None:
    """Prints native against reference, each pair interleaved, after checking that both give the same result."""
    import torch
    from rich.table import Table

    from fastlm import nn, ops

    lstm, gpt = language_models["LSTM"], language_models["GPT"]
    torch.manual_seed(seed)
    recurrent = next(module for module in lstm.model.modules() if isinstance(module, nn.LSTM))
    steps = torch.randn(32, 1, recurrent.input_size)
    logits = torch.randn(1, 50_257) * 3

    def forward_backward() -> Tensor:
        x = steps.clone().requires_grad_()
        recurrent(x)[0].square().sum().backward()
        assert x.grad is not None
        return x.grad

    def forward() -> Tensor:
        with torch.no_grad():
            return recurrent(steps)[0]

    def write(model: LanguageModel) -> Callable[[], Tensor]:
        prompt = model.tokenizer.encode(_PROMPT)
        return lambda: torch.tensor(model.generate_ids([prompt], max_new_tokens=48, min_new_tokens=48, temperature=0))

    work: list[tuple[str, Callable[[], Tensor]]] = [
        (f"LSTM layer, 32 steps of {recurrent.input_size}", forward),
        ("the same, forward and backward", forward_backward),
        ("LSTM writes 48 tokens", write(lstm)),
        ("GPT writes 48 tokens", write(gpt)),
        ("top-p sampling from 50,257 logits", lambda: ops.sample(logits, top_p=0.9, seed=seed)),
    ]
    table = Table("work", "native", "reference", "ratio", "largest difference", box=None, pad_edge=False)
    for name, function in work:
        with ops.backend("reference"):
            want = function()
        difference = float((function() - want).abs().max())
        times: list[tuple[float, float]] = []
        for _ in range(5):
            native = _time(function)
            with ops.backend("reference"):
                times.append((native, _time(function)))
        ours, theirs = (statistics.median(pair[side] for pair in times) for side in (0, 1))
        ratio = statistics.median(reference / native for native, reference in times)
        table.add_row(
            name,
            f"{ours * 1e3:.2f} ms",
            f"{theirs * 1e3:.2f} ms",
            f"{ratio:.1f}x",
            f"{difference:.0e}" if difference else "0",
        )
    recurrent.zero_grad()
    console.print(table)


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
