"""Perplexity against naive computations; every token scored once, with the context it was promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm.data import TokenFile, Tokenizer, encode_to_file
from fastlm.evaluation import Result, evaluate, perplexity
from fastlm.generation.language_model import LanguageModel
from fastlm.models import build
from fastlm.models.base import CausalLM
from fastlm.models.ngram import NGramLM

VOCABULARY = 11


def _gpt(context: int = 8) -> CausalLM:
    sizes: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "context_length": context}
    model = build({"architecture": "gpt", "vocab_size": VOCABULARY, "dropout": 0.5, **sizes})
    for parameter in model.parameters():  # larger than GPT-2's start, so that context matters
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def _lstm() -> CausalLM:
    model = build(
        {
            "architecture": "recurrent",
            "vocab_size": VOCABULARY,
            "embedding_size": 12,
            "hidden_size": 12,
            "num_layers": 1,
        }
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def _text(length: int = 41) -> Tensor:
    return torch.randint(VOCABULARY, (length,))


def _naive(model: CausalLM, text: Tensor, contexts: list[int]) -> float:
    """Mean loss of text[1:], token i given the `contexts[i - 1]` tokens before it, one forward pass each."""
    model.eval()
    total = 0.0
    for position, context in enumerate(contexts, start=1):
        logits = model(text[None, position - context : position])[0, -1]
        total -= torch.log_softmax(logits.double(), dim=0)[text[position]].item()
    return total / len(contexts)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_stride_one_gives_every_token_the_full_context(batch: int) -> None:
    model, text = _gpt(), _text()
    expected = _naive(model, text, [min(i, 8) for i in range(1, 41)])
    result = evaluate(model, text, stride=1, batch=batch)
    assert result.tokens == 40
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_stride_block_gives_disjoint_windows() -> None:
    model, text = _gpt(), _text(33)
    expected = _naive(model, text, [1 + (i % 8) for i in range(32)])
    assert evaluate(model, text, stride=8).loss == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, text, stride=1).loss != pytest.approx(expected, rel=5e-5)


def test_default_stride_is_half_a_block() -> None:
    model, text = _gpt(), _text()
    assert evaluate(model, text) == evaluate(model, text, block=8, stride=4)


def test_a_text_shorter_than_a_block() -> None:
    model, text = _gpt(), _text(4)
    assert evaluate(model, text).loss == pytest.approx(_naive(model, text, [1, 2, 3]), rel=1e-5)


@given(st.integers(2, 60), st.integers(1, 20), st.data(), st.integers(1, 7))
def test_windows_score_every_token_once_with_enough_context(n: int, block: int, data: Any, batch: int) -> None:
    stride = data.draw(st.integers(1, block))
    text = torch.arange(n)  # a token is its own position
    seen = []
    for inputs, targets in perplexity._windows(text, block, stride, batch):
        assert inputs.shape == targets.shape and inputs.shape[0] <= batch and inputs.shape[1] <= block
        for row, target in zip(inputs, targets, strict=True):
            assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row)))
            for column, token in enumerate(target.tolist()):
                if token != -100:
                    assert token == row[column] + 1
                    assert column + 1 >= min(token, block - stride + 1)
                    seen.append(token)
    assert seen == list(range(1, n))


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 8))
def test_streams_score_every_token_once_in_order(n: int, block: int, rows: int) -> None:
    rows = min(rows, n - 1)
    text = torch.arange(n)
    streams: list[list[int]] = [[] for _ in range(rows)]
    for inputs, targets in perplexity._streams(text, block, rows):
        assert inputs.shape == targets.shape and inputs.shape[0] == rows and inputs.shape[1] <= block
        for stream, row, target in zip(streams, inputs.tolist(), targets.tolist(), strict=True):
            for token, predicted in zip(row, target, strict=True):
                assert predicted in (-100, token + 1)
                stream.append(predicted)
    kept = [[token for token in stream if token != -100] for stream in streams]
    assert [token for tokens in kept for token in tokens] == list(range(1, n))
    for stream, tokens in zip(streams, kept, strict=True):
        assert stream[: len(tokens)] == tokens, "filling comes last: it must not come before a scored token"


@pytest.mark.parametrize("block", [1, 7, 50])
def test_carried_state_equals_one_pass_over_everything(block: int) -> None:
    model, text = _lstm().eval(), _text()
    logits = model(text[None, :-1])[0].double()
    expected = torch.nn.functional.cross_entropy(logits, text[1:]).item()
    assert evaluate(model, text, block=block).loss == pytest.approx(expected, rel=1e-5)


def test_streams_start_without_context() -> None:
    model, text = _lstm().eval(), _text()
    parts = [text[0:15], text[14:29], text[28:41]]
    losses = [torch.nn.functional.cross_entropy(model(p[None, :-1])[0].double(), p[1:]) * (len(p) - 1) for p in parts]
    result = evaluate(model, text, block=6, batch=3)
    assert result.tokens == 40
    assert result.loss == pytest.approx(sum(losses).item() / 40, rel=1e-5)  # type: ignore[union-attr]


def test_a_state_that_is_not_carried_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = _lstm(), _text()
    expected = evaluate(model, text, block=7).loss
    loss = CausalLM.loss
    monkeypatch.setattr(CausalLM, "loss", lambda self, x, y, state: loss(self, x, y, None))
    assert evaluate(model, text, block=7).loss != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [1 << 16, 7])
def test_ngram_models_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(perplexity, "_NGRAM_CHUNK", chunk)
    model = NGramLM(vocab_size=VOCABULARY, order=3).fit(_text(500))
    text = _text()
    result = evaluate(model, text)
    assert result.tokens == 40
    assert result.loss == pytest.approx(-np.mean(model.log_probs(text)[1:]), rel=1e-9)


def test_a_uniform_model_has_the_vocabulary_for_perplexity() -> None:
    model = _gpt()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    result = evaluate(model, _text(), byte_count=20)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.bits_per_token == pytest.approx(math.log2(VOCABULARY))
    assert result.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * 40 / 20)


def test_bits_per_byte_counts_utf8(tmp_path: Any) -> None:
    text = "Zoë läuft. 漢字! " * 20
    tokenizer = Tokenizer.train_bpe([text], 270)
    model = build(
        {
            "architecture": "gpt",
            "vocab_size": tokenizer.vocab_size,
            "context_length": 16,
            "num_layers": 1,
            "num_heads": 1,
        }
        | {"hidden_size": 8}
    )
    ids = tokenizer.encode(text)
    bytes_scored = len(text.encode()) - len(tokenizer.token_bytes(ids[0]))
    result = evaluate(LanguageModel(model, tokenizer), ids)
    assert result.bytes == bytes_scored
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * (len(ids) - 1) / bytes_scored)
    assert evaluate(model, ids, tokenizer=tokenizer) == result
    assert evaluate(model, ids).bits_per_byte is None
    file = encode_to_file([text], tokenizer, tmp_path / "x.tokens", end_of_text=False)
    assert isinstance(file, TokenFile)
    assert evaluate(model, file, tokenizer=tokenizer) == result


def test_max_batches_takes_the_first() -> None:
    model, text = _gpt(), _text()
    result = evaluate(model, text, block=8, stride=8, batch=2, max_batches=1)
    assert result.tokens == 16
    assert result.loss == pytest.approx(evaluate(model, text[:17], stride=8).loss, rel=1e-6)


def test_evaluation_leaves_no_trace() -> None:
    model, text = _gpt(), _text()
    generator = torch.get_rng_state()
    model.train()
    assert evaluate(model, text) == evaluate(model, text), "dropout is on"
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_overflow_is_infinite() -> None:
    assert Result(1e6, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1]}, "tokens: 1 tokens, expected at least 2"),
        ({"tokens": [0.5, 1.5, 2.5]}, "tokens: float64"),
        ({"block": 9}, r"block: 9, expected at most .* \(8\)"),
        ({"block": 4, "stride": 5}, r"stride: 5, expected at most block \(4\)"),
        ({"stride": 0}, "stride: 0"),
        ({"batch": 0}, "batch: 0"),
        ({"max_batches": 0}, "max_batches: 0"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(_gpt(), **{"tokens": _text(), **arguments})
