"""What the commands share: output, error reporting, and options that mean the same everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fastlm.generation import LanguageModel

__all__ = [
    "EXIT_ERROR",
    "DeviceOption",
    "DraftOption",
    "EXIT_INTERRUPTED",
    "KvOption",
    "ModelOption",
    "console",
    "errors",
    "load_model",
    "run",
]

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

console = Console(highlight=False)  # results
errors = Console(stderr=True, highlight=False)  # everything that is not the result

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH",
        help="A name that `fastlm pull` knows, a GGUF file, a Hugging Face folder, or a folder `fastlm train` wrote.",
    ),
]


class KvDtype(str, Enum):
    """What keys and values are kept in while generating."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"
    float8 = "float8_e4m3fn"


KvOption = Annotated[
    KvDtype | None,
    typer.Option(
        "--kv-dtype",
        help="Keep keys and values in this; int8 takes a quarter of float32's memory, and float8_e4m3fn, for GPUs.",
        show_default=False,
    ),
]


DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where the model runs; auto: a GPU if there is one.")
]


DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="NAME|PATH|KIND",
        help="Guess ahead with this model of the same vocabulary, or with a copy of the model in fewer bits (Q4_0): "
        "same text, sooner.",
    ),
]


def load_model(
    model: str,
    compute: str = "fast",
    kv_dtype: KvDtype | None = None,
    draft: str | None = None,
    device: str | None = None,
) -> LanguageModel:
    """`fastlm.load` for a command: says on stderr what it fetches, so that stdout holds the result alone."""
    import torch

    from fastlm.checkpoints.pull import KNOWN_MODELS, cached
    from fastlm.generation import load

    if not Path(model).exists() and model in KNOWN_MODELS and cached(model) is None:
        from fastlm.cli.pull import pull_with_progress

        pull_with_progress(model)
    kind = None if kv_dtype is None else getattr(torch, kv_dtype.value)
    return load(model, compute=compute, kv_dtype=kind, draft=draft, device=device)


def run(app: Callable[[], None]) -> None:
    """Runs a command: errors a user can mend become one message and exit code 1, Ctrl-C becomes 130.

    FASTLM_DEBUG=1 shows the traceback instead.
    """
    if os.environ.get("FASTLM_DEBUG"):
        app()
        return
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted", style="yellow")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`head`, say) has gone. Python would complain once more while flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        message = str(error) or type(error).__name__
        errors.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
        sys.exit(EXIT_ERROR)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
