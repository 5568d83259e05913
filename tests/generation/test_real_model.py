"""SmolLM2-135M end to end: what a user types, and the tokens of transformers in float32 on the same weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from logits import mean_kl

import fastlm
from fastlm.generation import LanguageModel

pytestmark = pytest.mark.model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 2, 3, 5, 8, 13,",
    "Water boils at a temperature of",
    "The three laws of thermodynamics are:\n1.",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\n",
    "La capitale de l'Espagne est",
    "SELECT name, COUNT(*) FROM",
    "Q: What is the largest planet in the solar system?\nA:",
    "To make a good cup of tea, first",
    "The quick brown fox jumps over the lazy dog. The quick brown",
    "\\begin{equation}\n  E = mc^2",
    "In 1969, Neil Armstrong",
    "<html>\n<head>\n<title>",
    "She opened the door slowly, and",
    "光合作用是",
    "A haiku about autumn:\n\n",
    "2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
)
NEW_TOKENS = 64
TIE = 1e-3  # where the reference's top two logits are closer than this, either token is right


@pytest.fixture(scope="module")
def peer(smollm2_gguf: Path) -> Any:
    """transformers' LlamaForCausalLM in float32, the file read and dequantised by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


def first_difference(peer: Any, prompt: list[int], new: list[int], banned: Collection[int]) -> int | None:
    """The first of our tokens that the peer, having read those before it, would not have chosen; None: there is none.

    `banned` are the stop tokens, which neither may choose before the row is complete.
    """
    with torch.no_grad():
        logits = peer(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    logits[:, list(banned)] = -torch.inf
    for at, (row, token) in enumerate(zip(logits, new, strict=True)):
        best, second = row.topk(2).values.tolist()
        if int(row.argmax()) != token:
            return None if best - second < TIE else at
    return None


def test_greedy_tokens_are_transformers(smollm2_gguf: Path, peer: Any) -> None:
    model = fastlm.load(smollm2_gguf, compute="exact")
    prompts = [model.encode(prompt) for prompt in PROMPTS]
    rows = model.generate_ids(prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=0)
    assert [len(row) for row in rows] == [NEW_TOKENS] * len(PROMPTS)
    for text, prompt, new in zip(PROMPTS, prompts, rows, strict=True):
        assert first_difference(peer, prompt, new, model.stop_ids) is None, text
        ids = torch.tensor([prompt + new])
        with torch.no_grad():
            assert mean_kl(peer(ids).logits, model.logits(ids)) < 1e-5, text


def test_the_comparison_sees_one_wrong_token(smollm2_gguf: Path, peer: Any) -> None:
    model = fastlm.load(smollm2_gguf, compute="exact")
    prompt = model.encode(PROMPTS[0])
    new = model.generate_ids([prompt], max_new_tokens=12, min_new_tokens=12, temperature=0)[0]
    new[7] = (new[7] + 1) % model.tokenizer.vocab_size
    assert first_difference(peer, prompt, new, model.stop_ids) == 7


@pytest.fixture(scope="module")
def fast(smollm2_gguf: Path) -> LanguageModel:
    """The model as `fastlm.load` gives it."""
    return fastlm.load(smollm2_gguf)


def test_knows_paris(fast: LanguageModel) -> None:
    assert "Paris" in fast.generate(PROMPTS[0], max_new_tokens=8, temperature=0)


@torch.inference_mode()
def test_a_cache_of_few_bytes_costs_little(fast: LanguageModel) -> None:
    # 512 tokens in steps of 16, each of which reads what the cache holds of all before it.
    ids = torch.tensor([fast.encode(__doc__ + Path(__file__).read_text())[:512]])
    found = []
    for kv_dtype in (None, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        state = fast.model.make_state(1, 512, kv_dtype=kv_dtype)
        found.append(torch.cat([fast.model(ids[:, i : i + 16], state) for i in range(0, 512, 16)], dim=1))
    assert 0 < mean_kl(found[0], found[1]) < 3e-4
    assert 0 < mean_kl(found[0], found[2]) < 3e-3
    assert 0 < mean_kl(found[0], found[3]) < 3e-2


def test_batch_and_stream_agree(fast: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.9, "seed": 11}
    together = fast.generate(list(PROMPTS[:6]), **options)
    assert together == [fast.generate(prompt, **options) for prompt in PROMPTS[:6]]
    assert "".join(fast.stream(PROMPTS[2], **options)) == together[2]


def test_chat_answers(smollm2_gguf: Path) -> None:
    # Exact arithmetic: so small a model is undecided about its first word, and rounding could tip it.
    answer = "".join(
        fastlm.load(smollm2_gguf, compute="exact").chat(
            [{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=40, temperature=0
        )
    )
    assert "Paris" in answer
    assert "<|im_" not in answer


def test_score_prefers_sense(fast: LanguageModel) -> None:
    sense = fast.score("The sun rises in the east and sets in the west.")
    nonsense = fast.score("The east rises in sets the and west in sun the.")
    assert sense.perplexity < nonsense.perplexity / 3
