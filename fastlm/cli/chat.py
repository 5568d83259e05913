"""`fastlm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.cli.common import DeviceOption, DraftOption, KvOption, ModelOption, errors, load_model

if TYPE_CHECKING:
    from fastlm.generation.params import SamplingOptions

__all__ = ["chat"]


def chat(
    model: ModelOption = "smollm2-135m",
    system: Annotated[str | None, typer.Option(help="A system message to start with.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-t", help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep this much probability.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    kv_dtype: KvOption = None,
    draft: DraftOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Talk with a model that has a chat template.

    Type a message and Enter. /reset forgets the conversation, /exit or Ctrl-D ends it, and Ctrl-C stops an answer.
    """
    from fastlm.generation import SamplingParams

    options: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    SamplingParams.of(**options)  # a wrong option is told before a model is loaded
    language_model = load_model(model, kv_dtype=kv_dtype, draft=draft, device=device)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    language_model.chat_prompt([*opening, {"role": "user", "content": "hello"}])  # fails now, not after typing
    if sys.stdin.isatty():
        errors.print(f"[dim]{model}: /reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer[/]")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            messages = list(opening)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in language_model.chat(messages, **options):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            errors.print("[dim] (stopped)[/]")
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})
