"""`fastlm generate`: continue a prompt."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.cli.common import DeviceOption, DraftOption, KvOption, ModelOption, errors, load_model

if TYPE_CHECKING:
    from fastlm.generation.params import SamplingOptions

__all__ = ["Compute", "generate"]


class Compute(str, Enum):
    """How quantised weights are multiplied."""

    fast = "fast"
    exact = "exact"


def _prompt(argument: str | None, file: Path | None) -> str:
    if argument is not None and argument != "-":
        if file is not None:
            raise typer.BadParameter("give the prompt as an argument or with --file, not both")
        return argument
    if file is not None:
        return file.read_text(encoding="utf-8")
    if argument is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, --file FILE, or pipe text in")
    return sys.stdin.read()


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue; '-' or nothing reads standard input.")
    ] = None,
    model: ModelOption = "smollm2-135m",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.", exists=True, dir_okay=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-t", help="Tokens to generate at the most.")
    ] = 128,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many continuations.")] = 1,
    stream: Annotated[bool, typer.Option(help="Show text as it comes (with --n 1).")] = True,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = False,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token.", rich_help_panel="Sampling")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely; 0: off.", rich_help_panel="Sampling")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability.", rich_help_panel="Sampling")] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens this likely, relative to the likeliest.", rich_help_panel="Sampling")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="> 1 discourages repetition.", rich_help_panel="Sampling")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.", rich_help_panel="Sampling")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string (repeatable).")] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(help="Guess this many tokens ahead, with --draft or else where the text repeats itself. 0: off."),
    ] = None,
    compute: Annotated[Compute, typer.Option(help="Arithmetic for quantised weights.")] = Compute.fast,
    kv_dtype: KvOption = None,
    draft: DraftOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a prompt with a pretrained or trained model.

    Examples:

      fastlm generate -m smollm2-135m "The capital of France is" --temperature 0

      fastlm generate -m runs/mine "Once" --n 3 --seed 7

      cat story.txt | fastlm generate -m model.gguf --stop "THE END"
    """
    text = _prompt(prompt, file)
    options: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    if draft_tokens is not None:
        options["draft_tokens"] = draft_tokens
    from fastlm.generation import SamplingParams

    SamplingParams.of(**options)  # a wrong option is told before a model is loaded
    language_model = load_model(model, compute.value, kv_dtype, draft, device)
    if n == 1 and stream:
        pieces = language_model.stream(text, **options)
        if echo:
            sys.stdout.write(text)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    for index, completion in enumerate(language_model.complete([text] * n, **options)):
        if n > 1:
            errors.print(f"[dim]--- {index + 1} of {n}, seed {completion.seed}, ended by {completion.finish_reason}[/]")
        sys.stdout.write((text if echo else "") + completion.text + "\n")
