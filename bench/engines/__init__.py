"""What is compared: one module per engine, each with a class `Engine` of the same surface, run by `bench.worker`.

    Engine(model: str, threads: int, **options)
    generate(prompts: list of equally long id lists, tokens, top_p=None) -> new ids per prompt
        exactly `tokens` each, greedy where top_p is None, else drawn at temperature 0.8 within top_p
    about() -> how the engine says it was built or computes
    settle(prompts, tokens) -> bytes that a step no longer reads of the weights, and what a reader should know
        ours alone, before the turns: generates until what only long use brings is there (`settle` below)
    logits(ids) -> float32 array [len(ids), vocabulary]

The module is named as the engine's package is, or `fastlm`. Each engine is used the way its own users get the most out
of it: weights loaded once, the prompt in one pass, no callback or text conversion per token.
"""

from __future__ import annotations

from collections.abc import Callable

TEMPERATURE = 0.8
_MOST_CALLS = 60


def settle(generate: Callable[[], object]) -> tuple[int, str]:
    """Calls `generate` until greedy steps go by a screen of the head (fastlm/generation/screening.py) or it is clear
    that none will: a kept engine's steady state. The bytes that a step then spares, and what to say of it."""
    from fastlm.generation.screening import heads

    calls = 0
    while calls == 0 or (calls < _MOST_CALLS and any(head.pending for head in heads())):
        generate()
        calls += 1
    spared = max((head.spared for head in heads()), default=0)
    if spared == 0:
        return 0, "a kept engine's steady state; no screen of the head"
    return spared, f"a kept engine's steady state, after {calls} texts: its greedy steps go by a screen of the head"
