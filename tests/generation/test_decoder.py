"""The loop: a row's tokens do not depend on its batch, options do what they say, ends are told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY, VOCAB, gpt, lstm, spread

from fastlm import ops
from fastlm.generation import Decoder, LanguageModel, SamplingParams
from fastlm.models.base import CausalLM


@pytest.fixture(params=["gpt", "llama", "lstm"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return spread(TINY[request.param])


def _ids(model: CausalLM, prompts: list[list[int]], **options: object) -> list[list[int]]:
    return LanguageModel(model).generate_ids(prompts, **options)


PROMPTS = [[1, 2, 3], [7], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6], [3] * 20, [11, 12]]


def test_greedy_equals_recomputing_everything(model: CausalLM) -> None:
    got = _ids(model, PROMPTS, max_new_tokens=12, temperature=0)
    with torch.no_grad(), ops.backend("reference"):
        for prompt, new in zip(PROMPTS, got, strict=True):
            ids = list(prompt)
            for token in new:
                logits = model(torch.tensor([ids]))[0, -1]
                assert logits.max() - logits[token] < 1e-4
                ids.append(token)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_p": 0.9, "frequency_penalty": 0.5}]
)
def test_batch_and_order_never_change_a_row(model: CausalLM, options: dict[str, object]) -> None:
    together = _ids(model, PROMPTS, max_new_tokens=16, **options)
    alone = [_ids(model, [prompt], max_new_tokens=16, **options)[0] for prompt in PROMPTS]
    backwards = _ids(model, PROMPTS[::-1], max_new_tokens=16, **options)[::-1]
    assert together == alone == backwards


def test_large_batches_are_no_exception(model: CausalLM) -> None:
    prompts = [[row, 2 * row % VOCAB, 5] for row in range(40)]
    together = _ids(model, prompts, max_new_tokens=6, seed=3)
    assert together == [_ids(model, [prompt], max_new_tokens=6, seed=3)[0] for prompt in prompts]


def test_rows_that_end_early_leave_the_others_alone(model: CausalLM) -> None:
    free = _ids(model, PROMPTS, max_new_tokens=16, seed=1)
    stop = free[1][2]
    decoder = Decoder(model, PROMPTS, SamplingParams(max_new_tokens=16, seed=1), stop_ids=[stop])
    rows: list[list[int]] = [[] for _ in PROMPTS]
    while decoder.active:
        for token in decoder.step():
            rows[token.row].append(token.id)
    for row, whole in zip(rows, free, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(rows[1]) == 3


def test_equal_prompts_draw_differently_and_reproducibly(model: CausalLM) -> None:
    three = _ids(model, [[1, 2]] * 3, max_new_tokens=12, seed=9)
    assert len({tuple(row) for row in three}) == 3
    mixed = _ids(model, [[1, 2], [5], [1, 2], [1, 2]], max_new_tokens=12, seed=9)
    assert [mixed[0], mixed[2], mixed[3]] == three
    assert _ids(model, [[1, 2]], max_new_tokens=12, seed=9)[0] == three[0]
    assert _ids(model, [[1, 2]], max_new_tokens=12, seed=10)[0] != three[0]


def test_logit_bias_bans_and_forces_tokens(model: CausalLM) -> None:
    free = _ids(model, [[1, 2, 3]], max_new_tokens=8, seed=1)[0]
    banned = _ids(model, [[1, 2, 3]], max_new_tokens=8, seed=1, logit_bias={free[0]: -torch.inf})[0]
    assert free[0] not in banned
    assert _ids(model, [[1, 2, 3]], max_new_tokens=3, seed=1, logit_bias={7: 1e4})[0] == [7, 7, 7]
    with pytest.raises(ValueError, match=f"logit_bias: token {VOCAB} is outside"):
        _ids(model, [[1]], logit_bias={VOCAB: 1.0})


def test_min_new_tokens_holds_back_stop_tokens(model: CausalLM) -> None:
    first = _ids(model, [[1, 2, 3]], max_new_tokens=1, temperature=0)[0][0]
    params = SamplingParams(max_new_tokens=8, min_new_tokens=4, temperature=0)
    decoder = Decoder(model, [[1, 2, 3]], params, stop_ids=[first])
    new = []
    while decoder.active:
        new += [token.id for token in decoder.step()]
    assert len(new) >= 4
    assert first not in new[:4]


def test_logprobs_are_the_models(model: CausalLM) -> None:
    decoder = Decoder(model, [[1, 2, 3]], SamplingParams(max_new_tokens=6, seed=2, top_k=5, logprobs=True))
    ids, got = [1, 2, 3], []
    while decoder.active:
        for token in decoder.step():
            ids.append(token.id)
            got.append(token.logprob)
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0].log_softmax(-1)[torch.arange(2, len(ids) - 1), torch.tensor(ids[3:])]
    torch.testing.assert_close(torch.tensor(got), want, atol=1e-4, rtol=1e-4)


def test_a_full_context_ends_the_row() -> None:
    decoder = Decoder(gpt(), [[1] * 60, [1] * 3], SamplingParams(max_new_tokens=30, seed=0))
    finish: dict[int, str | None] = {}
    count = [0, 0]
    while decoder.active:
        for token in decoder.step():
            count[token.row] += 1
            finish[token.row] = token.finish
    assert finish == {0: "context", 1: "length"}
    assert count == [5, 30]  # 60 + 4 tokens fill the context of 64; a fifth is sampled from it


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: got none"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 65], "prompt 0 has 65 tokens, but the model's context holds 64"),
        ([[VOCAB]], f"id {VOCAB} is outside the vocabulary"),
    ],
)
def test_bad_prompts(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ids(gpt(), prompts, max_new_tokens=2)


def test_nan_weights_are_an_error_not_a_token(model: CausalLM) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"(?i)nan"):
        _ids(model, [[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize("fault", ["sequence", "position"])
def test_the_batch_test_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws that depend on the place in the batch, or that repeat, the tests above turn red."""
    torch.manual_seed(5)
    model = lstm().eval()
    sample: Callable[..., torch.Tensor] = ops.sample

    def wrong(logits: torch.Tensor, **options: object) -> torch.Tensor:
        options[fault] = torch.arange(logits.shape[0]) if fault == "sequence" else 0
        return sample(logits, **options)

    options: dict[str, object] = {"max_new_tokens": 12, "seed": 3}
    right = _ids(model, PROMPTS, **options)
    monkeypatch.setattr(ops, "sample", wrong)
    assert _ids(model, PROMPTS, **options) != right
