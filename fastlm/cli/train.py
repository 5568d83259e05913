"""`fastlm train`: a language model of your own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.common import EXIT_INTERRUPTED, console, errors

if TYPE_CHECKING:
    from fastlm.models.base import CausalLM
    from fastlm.training import TrainingResult
    from fastlm.training.prepare import PreparedData

__all__ = ["train"]

_PLAN = "train.json"
_NGRAM_ORDER = 5
_NGRAM_TOKENS = 2_000_000
_FINAL_TOKENS = 200_000

# What a resumed run keeps.
_FIXED: tuple[str, ...] = (
    "data",
    "valid",
    "valid_fraction",
    "tokenizer",
    "vocab_size",
    "clean",
    "model",
    "preset",
    "layers",
    "width",
    "heads",
)
_FIXED += ("context", "embedding", "dropout")
_MODEL, _DATA, _STEPS, _RUN = "Model", "Data", "Optimisation", "Run"


def train(
    ctx: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER|NAME|-", help="Text: a file, a folder, topics, stdlib, or - for stdin."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/default"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out stopped, with the options it had.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(metavar="gpt|modern|llama|lstm|gru|rnn|FILE.json", help="Architecture.", rich_help_panel=_MODEL),
    ] = "gpt",
    preset: Annotated[
        str,
        typer.Option(
            metavar="tiny|small|medium|large",
            help="Size. For gpt: 0.8M, 11M, 85M, 302M parameters besides the embedding.",
            rich_help_panel=_MODEL,
        ),
    ] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers.", rich_help_panel=_MODEL)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Hidden size.", rich_help_panel=_MODEL)] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads (gpt, llama).", rich_help_panel=_MODEL)
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens it sees at once (gpt, llama).", rich_help_panel=_MODEL)
    ] = None,
    embedding: Annotated[
        int | None, typer.Option(min=1, help="Embedding size (lstm, gru, rnn).", rich_help_panel=_MODEL)
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="0.1 to 0.5 for small text.", rich_help_panel=_MODEL)] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="bpe|byte|char|word|FOLDER", help="Learnt from the text.", rich_help_panel=_DATA)
    ] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option(help="bpe, word. Default: by the length of the text.", rich_help_panel=_DATA)
    ] = None,
    valid: Annotated[
        str | None, typer.Option(help="Validation text. Default: the end of --data.", rich_help_panel=_DATA)
    ] = None,
    valid_fraction: Annotated[float, typer.Option(help="How much of its end.", rich_help_panel=_DATA)] = 0.1,
    clean: Annotated[
        str, typer.Option(metavar="STEP,...", help="Cleaning steps, in order. Default: none.", rich_help_panel=_DATA)
    ] = "",
    steps: Annotated[int | None, typer.Option(help="Default: 2000.", rich_help_panel=_STEPS)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text instead.", rich_help_panel=_STEPS)] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds at the most.", rich_help_panel=_STEPS)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks a step. Default: 16.", rich_help_panel=_STEPS)] = None,
    block: Annotated[int | None, typer.Option(help="Tokens a block.", rich_help_panel=_STEPS)] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Slices to take a batch in, to save memory.", rich_help_panel=_STEPS)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="adamw|adam|sgd|muon", help="Default: by the model.", rich_help_panel=_STEPS)
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd.", rich_help_panel=_STEPS)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: by the preset.", rich_help_panel=_STEPS)
    ] = None,
    min_lr: Annotated[
        float | None, typer.Option(help="Where decay ends. Default: a tenth of --lr.", rich_help_panel=_STEPS)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="cosine|linear|constant",
            help="Default: cosine; constant where only time ends the run.",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps to the peak. Default: 100.", rich_help_panel=_STEPS)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.1.", rich_help_panel=_STEPS)] = None,
    clip: Annotated[float | None, typer.Option(help="Gradient norm. Default: 1.", rich_help_panel=_STEPS)] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new best.", rich_help_panel=_STEPS)
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option("--recompute", help="Less memory, a third more time (gpt, llama).", rich_help_panel=_STEPS),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="auto|float32|bfloat16|float16", help="Default: what is fast here.", rich_help_panel=_STEPS
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same losses.", rich_help_panel=_RUN)] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="Default: a GPU if there is one.", rich_help_panel=_RUN)
    ] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Steps between evaluations. Default: 250.", rich_help_panel=_RUN)
    ] = None,
    eval_batches: Annotated[
        int | None, typer.Option(help="Batches of held-out text each. Default: 40.", rich_help_panel=_RUN)
    ] = None,
    checkpoint_interval: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: as evaluations.", rich_help_panel=_RUN)
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep. Default: 2.", rich_help_panel=_RUN)] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard too.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Train a language model on text.

    It holds out the end of the text, shows progress, keeps the best model by validation loss, draws the loss curve, and
    at the end compares the held-out perplexity with an n-gram model's. Ctrl-C leaves a checkpoint: --resume goes on, to
    the very losses it would have had.

    Examples:

      fastlm train --data my.txt --out runs/mine

      fastlm train --data my.txt --model lstm --tokenizer char --preset small --dropout 0.3 --out runs/lstm

      fastlm train --data books/ --clean nfc,normalize_newlines,strip_gutenberg_header --out runs/books

      cat *.txt | fastlm train --data - --time-limit 600 --out runs/quick

      fastlm train --out runs/mine --resume --steps 5000
    """
    from fastlm.checkpoints.atomic import write_json_atomic
    from fastlm.training import (
        ProgressBar,
        TensorBoardLog,
        Trainer,
        TrainingConfig,
        TrainingInterrupted,
        plot_losses,
        presets,
    )
    from fastlm.training import resume as resume_files
    from fastlm.training.prepare import DataOptions, load, prepare

    changes = {
        "max_steps": steps,
        "epochs": epochs,
        "time_limit": time_limit,
        "batch_size": batch_size,
        "block_length": block,
        "accumulation": accumulate,
        "optimizer": optimizer,
        "momentum": momentum,
        "learning_rate": lr,
        "min_learning_rate": min_lr,
        "schedule": schedule,
        "warmup_steps": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip,
        "patience": patience,
        "precision": precision,
        "recompute": recompute,
        "seed": seed,
        "device": device,
        "eval_interval": eval_interval,
        "eval_batches": eval_batches,
        "checkpoint_interval": checkpoint_interval,
        "keep_checkpoints": keep,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    fixed = {name: ctx.params[name] for name in _FIXED}
    plan = _read_plan(out / _PLAN)
    if plan is not None and not resume:
        raise ValueError(f"--out: {out} already holds a run; add --resume to go on with it, or give another folder")
    if plan is None:
        if data is None:
            raise typer.BadParameter("give text to train on, e.g. --data my.txt (or --resume, where --out has a run)")
        if preset not in presets.PRESETS:
            raise typer.BadParameter(f"preset: {preset!r}, expected {', '.join(presets.PRESETS)}")
        TrainingConfig.from_dict(_ended(changes))  # a wrong option is told before the text is read
        options = DataOptions(data, valid, tokenizer, vocab_size, valid_fraction, tuple(filter(None, clean.split(","))))
        prepared = prepare(options, out / "data", report=lambda line: errors.print(f"[dim]{line}[/]"))
        model_config = presets.model_config(
            model,
            preset,
            prepared.tokenizer.vocab_size,
            layers=layers,
            width=width,
            heads=heads,
            context=context,
            embedding=embedding,
            dropout=dropout,
        )
        defaults = presets.training_defaults(model_config, preset)
        config = TrainingConfig.from_dict(_ended({**defaults, **changes}))
    else:
        for name, value in fixed.items():
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE" and value != plan["options"][name]:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: {value!r}, expected {plan['options'][name]!r}, with which {out} was begun")
        fixed = plan["options"]
        prepared = load(out / "data", cached=True)
        model_config = plan["model"]
        config = TrainingConfig.from_dict({**plan["training"], **changes})
    network = _build(model_config, config.seed)
    callbacks: list[Any] = [ProgressBar(errors, label=out.name)]
    if tensorboard:
        callbacks.append(TensorBoardLog(out / "tensorboard"))
    trainer = Trainer(network, prepared.train, prepared.valid, config, out, callbacks, tokenizer=prepared.tokenizer)
    write_json_atomic(out / _PLAN, {"options": fixed, "model": model_config, "training": config.to_dict()})
    if resume_files.checkpoints(out):
        trainer.resume()
    _say_plan(trainer, prepared, out)
    try:
        result = trainer.train()
    except TrainingInterrupted as stop:
        if stop.result.steps:
            plot_losses({out.name: out}, out / "loss.png")
        errors.print(
            f"interrupted after step {stop.result.steps}; go on with: fastlm train --out {out} --resume",
            style="yellow",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from stop
    _finish(result, prepared, out)


def _ended(fields: dict[str, Any]) -> dict[str, Any]:
    """`--epochs` or `--time-limit` alone end a run; the default number of steps is for runs with none of the three."""
    if "max_steps" in fields or not fields.keys() & {"epochs", "time_limit"}:
        return fields
    constant = {} if "epochs" in fields else {"schedule": "constant"}
    return {**constant, **fields, "max_steps": None}


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error


def _build(model_config: dict[str, Any], seed: int) -> CausalLM:
    import torch

    from fastlm import models

    torch.manual_seed(seed)
    return models.build(model_config)


def _say_plan(trainer: Any, prepared: PreparedData, out: Path) -> None:
    config, model = trainer.config, trainer.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = trainer.total_steps
    seen = (total or 0) * config.batch_size * config.block_length
    length = f"{total:,} steps = {seen / len(prepared.train):.1f} passes" if total else f"{config.time_limit:.0f} s"
    lines = [
        f"data: {len(prepared.train):,} tokens to train on, {len(prepared.valid):,} held out, "
        f"vocabulary {prepared.tokenizer.vocab_size:,}{' (tokenised before)' if prepared.cached else ''}",
        f"model: {type(model).__name__}, {parameters:,} parameters, {trainer.precision} on {trainer.device}",
        f"training: {length}, {config.batch_size} x {config.block_length} tokens a step, {config.optimizer}, "
        f"learning rate {config.learning_rate:g}",
        f"checkpoints: {out}, every {config.checkpoint_interval or config.eval_interval} steps",
    ]
    if trainer.step:
        lines.append(f"resumed at step {trainer.step:,}")
    for line in lines:
        errors.print(line, soft_wrap=True)


def _finish(result: TrainingResult, prepared: PreparedData, out: Path) -> None:
    """Judges the best model on held-out text, beside the n-gram model, and says what to do next."""
    from rich.table import Table

    from fastlm.checkpoints.atomic import write_json_atomic
    from fastlm.checkpoints.run import load_run
    from fastlm.evaluation import evaluate
    from fastlm.models.ngram import NGramLM
    from fastlm.training import plot_losses

    tokens, tokenizer = prepared.valid.tokens[:_FINAL_TOKENS], prepared.tokenizer
    whole = len(tokens) == len(prepared.valid)
    # The first token is not scored. Where only a part is evaluated, its bytes are counted by the tokenizer.
    byte_count = prepared.valid_bytes - len(tokenizer.token_bytes(int(tokens[0]))) if whole else None
    errors.print(f"[dim]evaluating on {len(tokens):,} held-out tokens[/]")
    best = evaluate(load_run(out).model, tokens, byte_count=byte_count, tokenizer=tokenizer)
    ngram = NGramLM(order=_NGRAM_ORDER, vocab_size=tokenizer.vocab_size).fit(prepared.train.tokens[:_NGRAM_TOKENS])
    baseline = evaluate(ngram, tokens, byte_count=byte_count, tokenizer=tokenizer)
    plot_losses({out.name: out}, out / "loss.png", baselines={f"{_NGRAM_ORDER}-gram": baseline.loss})
    rows = {
        f"{out.name}, step {result.best_step or result.steps}": best,
        f"{_NGRAM_ORDER}-gram, Kneser-Ney": baseline,
    }
    table = Table("held-out text", "perplexity", "bits per byte", box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(name, f"{row.perplexity:.2f}", f"{row.bits_per_byte or 0.0:.4f}")
    facts = {"steps": result.steps, "best_step": result.best_step, "reason": result.reason, "seconds": result.seconds}
    scores = {
        name: {"loss": row.loss, "perplexity": row.perplexity, "bits_per_byte": row.bits_per_byte}
        for name, row in (("model", best), ("ngram", baseline))
    }
    write_json_atomic(out / "result.json", {**facts, **scores, "tokens": best.tokens})
    errors.print(f"stopped by {result.reason} after {result.steps:,} steps and {result.seconds:.0f} s")
    console.print(table)
    errors.print(f"curve: {out / 'loss.png'}\ntry it: fastlm generate -m {out} 'The '", soft_wrap=True)
    sys.stdout.flush()
