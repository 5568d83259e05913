"""`fastlm eval`: how well a model predicts a text."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fastlm.cli.common import ModelOption, console, load_model
from fastlm.cli.generate import Compute

__all__ = ["evaluate"]


def evaluate(
    data: Annotated[
        str, typer.Option(metavar="FILE|FOLDER|NAME|-", help="Text: a file, a folder, topics, stdlib, or - for stdin.")
    ],
    model: ModelOption = "smollm2-135m",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    block: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window. Default: the context, at most 1024.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; smaller: more context, slower. Default: half.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows (or streams, if recurrent) at a time.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Evaluate only the beginning of the text.")] = None,
    compute: Annotated[Compute, typer.Option(help="Arithmetic for quantised weights.")] = Compute.fast,
) -> None:
    """Perplexity and bits per byte of a text under a model.

    Every token is scored once, given as much of the text before it as the model can see. Perplexity is per token, so
    it compares models with one tokenizer; bits per byte compares any.

    Examples:

      fastlm eval -m runs/mine --data other.txt

      fastlm eval -m smollm2-135m --data topics --max-tokens 5000 --json
    """
    import numpy as np

    from fastlm.data.corpora import corpus
    from fastlm.evaluation import evaluate as score

    texts = corpus(data)
    first = next(texts)  # a missing file is told before a model is loaded
    language_model = load_model(model, compute.value)
    tokenizer = language_model.tokenizer
    tokens = [np.array([tokenizer.bos_id] if tokenizer.adds_bos else [], dtype=np.uint32)]
    count, byte_count = len(tokens[0]), 0
    text: str | None = first
    while text is not None and (max_tokens is None or count < max_tokens):
        tokens.append(np.array(tokenizer.encode(text), dtype=np.uint32))
        count += len(tokens[-1])
        byte_count += len(text.encode())
        text = next(texts, None)
    ids = np.concatenate(tokens)
    if len(ids) < 2:
        raise ValueError(f"--data: {data}: {len(ids)} tokens are too few, expected at least 2")
    known_bytes: int | None = byte_count - len(tokenizer.token_bytes(int(ids[0])))  # the first token is not scored
    if max_tokens is not None and len(ids) > max_tokens:
        ids, known_bytes = ids[:max_tokens], None
    result = score(language_model, ids, block=block, stride=stride, batch=batch, byte_count=known_bytes)
    if as_json:
        facts = {
            "model": model,
            "data": data,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "bits_per_token": result.bits_per_token,
            "loss": result.loss,
            "tokens": result.tokens,
            "bytes": result.bytes,
        }
        typer.echo(json.dumps(facts))
        return
    console.print(f"perplexity      {result.perplexity:.4f}")
    console.print(f"bits per byte   {result.bits_per_byte or 0.0:.4f}")
    console.print(f"bits per token  {result.bits_per_token:.4f}")
    console.print(f"tokens          {result.tokens:,} scored, {result.bytes or 0:,} bytes")
