"""`fastlm quantize`: a GGUF file with smaller weights, and what that costs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.common import console, load_model

__all__ = ["quantize"]


class Kind(str, Enum):
    """The kinds of weights that can be written."""

    Q8_0 = "Q8_0"
    Q4_1 = "Q4_1"
    Q4_0 = "Q4_0"
    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"


def quantize(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A GGUF file.")],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="The GGUF file to write.")],
    kind: Annotated[Kind, typer.Option(help="Of the matrices; embedding and head keep at least 8 bits.")] = Kind.Q8_0,
    data: Annotated[str, typer.Option(metavar="FILE|FOLDER|NAME", help="Text to judge both files by.")] = "topics",
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens of it; 0: don't judge.")] = 2000,
) -> None:
    """Writes a model's weights in another kind, and prints sizes and perplexities before and after.

    Examples:

      fastlm quantize model-f16.gguf model-q8.gguf

      fastlm quantize model-f16.gguf model-q4.gguf --kind Q4_1 --data my.txt
    """
    from fastlm.checkpoints.requantize import requantize_gguf

    before = _perplexity(source, data, max_tokens)
    requantize_gguf(source, target, kind.value)
    after = _perplexity(target, data, max_tokens)
    for label, file, perplexity in (("before", source, before), ("after", target, after)):
        shown = "" if perplexity is None else f"perplexity {perplexity:.4f}"
        console.print(f"{label:<7} {file.stat().st_size / 1e6:10.1f} MB  {shown}")


def _perplexity(file: Path, data: str, max_tokens: int) -> float | None:
    import numpy as np

    from fastlm.data.corpora import corpus
    from fastlm.evaluation import evaluate

    if max_tokens == 0:
        return None
    model = load_model(str(file))
    ids: list[int] = []
    for text in corpus(data):
        ids += model.tokenizer.encode(text)
        if len(ids) >= max_tokens:
            break
    if len(ids) < 2:
        raise ValueError(f"--data: {data}: {len(ids)} tokens are too few, expected at least 2")
    return evaluate(model, np.array(ids[:max_tokens], dtype=np.uint32)).perplexity
