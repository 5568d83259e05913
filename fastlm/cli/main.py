"""The command line: `fastlm <command>`. Each command is a file of this package."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastlm import __version__
from fastlm.cli.chat import chat
from fastlm.cli.common import run
from fastlm.cli.demo import demo
from fastlm.cli.evaluate import evaluate
from fastlm.cli.generate import generate
from fastlm.cli.info import info
from fastlm.cli.pull import pull
from fastlm.cli.quantize import quantize
from fastlm.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastlm",
    help="Language models that run fast on the machine you have.\n\nStart with [bold]fastlm demo[/], which trains two "
    "small models and compares them, or [bold]fastlm generate -m smollm2-135m 'The capital of France is'[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, generate, chat, pull, quantize, info):
    app.command()(command)
app.command("eval")(evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `fastlm` script."""
    # Read once, when torch loads the OpenMP runtime: how long an idle thread spins before it sleeps. The default of
    # milliseconds starves other processes and, on a busy machine, this one's own threads; these tens of microseconds
    # still bridge the gap between two kernels (docs/performance.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    run(app)


if __name__ == "__main__":
    main()
