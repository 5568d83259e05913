"""What is compared: one module per engine, each with a class `Engine` of the same surface, run by `bench.worker`.

    Engine(model: str, threads: int, **options)
    generate(prompts: list of equally long id lists, tokens, top_p=None) -> new ids per prompt
        exactly `tokens` each, greedy where top_p is None, else drawn at temperature 0.8 within top_p
    about() -> how the engine says it was built or computes
    logits(ids) -> float32 array [len(ids), vocabulary]

The module is named as the engine's package is, or `fastlm`. Each engine is used the way its own users get the most out
of it: weights loaded once, the prompt in one pass, no callback or text conversion per token.
"""

TEMPERATURE = 0.8
