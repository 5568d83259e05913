"""fastlm inside transformers: its attention and its generation give what transformers' own do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gguf_files import VOCAB, gpt2, llama, qwen2, randomized
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList

import fastlm
from fastlm.integrations import transformers as integration

MODELS = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().eval()


def _ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, count))


def _silent(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls it with fastlm's warnings as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastlm.generate")
        return function(*args, **kwargs)


def test_greedy_text_is_transformers(model: Any) -> None:
    ids = _ids(1, 9)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    got = _silent(model.generate, ids, max_new_tokens=20, do_sample=False, custom_generate=fastlm.generate)
    assert torch.equal(got, want)
    guessed = _silent(
        model.generate, ids, max_new_tokens=20, do_sample=False, custom_generate=fastlm.generate, draft_tokens=4
    )
    assert torch.equal(guessed, want)


@pytest.mark.parametrize("draft", [None, "auto", "Q4_0"])
def test_a_copy_that_guesses_changes_nothing(model: Any, draft: str | None) -> None:
    ids = _ids(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    want = model.generate(ids, **options)
    got = _silent(model.generate, ids, custom_generate=fastlm.generate, draft=draft, **options)
    assert torch.equal(got, want)
    copies = integration._drafts.get(integration.convert(model), {})
    assert list(copies) == ([] if draft is None else [{"auto": "Q8_0"}.get(draft, draft)])
    with pytest.raises(ValueError, match="quantized_copy: kind is 'Q3'"):
        model.generate(ids, custom_generate=fastlm.generate, draft="Q3", **options)


def test_padded_batches_and_ends(model: Any) -> None:
    ids = _ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :6] = 0
    ids = ids * mask
    free = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    stop = int(free[1, 8 + 3])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, eos_token_id=stop, **options)
    got = _silent(model.generate, ids, eos_token_id=stop, custom_generate=fastlm.generate, **options)
    assert torch.equal(got, want)
    options["min_new_tokens"] = 6
    want = model.generate(ids, eos_token_id=stop, **options)
    got = _silent(model.generate, ids, eos_token_id=stop, custom_generate=fastlm.generate, **options)
    assert torch.equal(got, want)


def test_penalties_are_transformers(model: Any) -> None:
    ids = _ids(1, 9)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.4}
    want = model.generate(ids, **options)
    assert torch.equal(_silent(model.generate, ids, custom_generate=fastlm.generate, **options), want)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert not torch.equal(plain, want)


def test_sampling_is_repeatable_and_differs_between_sequences(model: Any) -> None:
    ids = _ids(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.95, "top_k": 30, "temperature": 1.5}
    options["num_return_sequences"] = 3
    torch.manual_seed(7)
    first = _silent(model.generate, ids, custom_generate=fastlm.generate, **options)
    torch.manual_seed(7)
    assert torch.equal(_silent(model.generate, ids, custom_generate=fastlm.generate, **options), first)
    assert not torch.equal(_silent(model.generate, ids, custom_generate=fastlm.generate, **options), first)
    assert len({tuple(row) for row in first.tolist()}) == 3 and (first[:, :5] == ids).all()


def test_samples_follow_the_filtered_distribution() -> None:
    torch.manual_seed(1)
    model: Any = llama().eval()
    ids = _ids(1, 4)
    with torch.no_grad():
        logits = model(ids).logits[0, -1] / 2.0
    kept = logits.topk(6)
    p = kept.values.softmax(-1)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, "top_k": 6, "temperature": 2.0}
    out = _silent(model.generate, ids, custom_generate=fastlm.generate, num_return_sequences=4000, **options)
    counts = torch.stack([(out[:, -1] == token).sum() for token in kept.indices]).double()
    assert counts.sum() == 4000
    chi_square = ((counts - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, 1 in 1000


def test_a_streamer_gets_every_token(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    ids, streamer = _ids(1, 6), Streamer()
    out = _silent(
        model.generate, ids, max_new_tokens=7, do_sample=False, custom_generate=fastlm.generate, streamer=streamer
    )
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_quantised_weights_are_close_and_remembered() -> None:
    model: Any = llama().eval()
    ids = _ids(1, 9)
    out = _silent(
        model.generate, ids, max_new_tokens=8, do_sample=False, custom_generate=fastlm.generate, weights="Q8_0"
    )
    assert out.shape == (1, 17)
    ours = integration.convert(model, "Q8_0")
    assert integration.convert(model, "Q8_0") is ours and integration.convert(model) is not ours
    with torch.no_grad():
        want = model(ids).logits
        assert torch.nn.functional.cosine_similarity(ours(ids), want, dim=-1).min() > 0.999
        model.lm_head.weight.mul_(2)
    assert integration.convert(model, "Q8_0") is not ours


def test_float32_weights_share_their_memory_and_follow_training() -> None:
    model: Any = llama().eval()
    ids = _ids(1, 9)
    ours = integration.convert(model)
    assert ours.layers[0].mlp.up.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        _silent(model.generate, ids, max_new_tokens=12, do_sample=False, custom_generate=fastlm.generate), want
    )


class Shift(LogitsProcessor):
    """A logits processor of the user's own."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(1, -1)


def test_what_it_cannot_do_goes_to_transformers_with_the_reason() -> None:
    model: Any = llama().eval()
    ids = _ids(1, 6)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("logits processor Shift", {"logits_processor": LogitsProcessorList([Shift()])}),
        ("output_logits=True", {"return_dict_in_generate": True, "output_logits": True}),
        ("stopping criterion MaxTimeCriteria", {"max_time": 100.0}),
        ("generation mode beam_search", {"num_beams": 2}),
    ]
    for reason, options in cases:
        want = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
        with pytest.warns(UserWarning, match=f"leaves this to transformers: {reason}"):
            got = model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=fastlm.generate, **options)
        if options.get("return_dict_in_generate"):
            want, got = want.sequences, got.sequences
        assert torch.equal(got, want), reason


def test_dictionaries_are_returned_where_asked_for(model: Any) -> None:
    ids = _ids(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(ids, **options).sequences
    assert torch.equal(_silent(model.generate, ids, custom_generate=fastlm.generate, **options).sequences, want)


def _with(model: Any, implementation: str) -> Any:
    made = AutoModelForCausalLM.from_config(model.config, attn_implementation=implementation)
    made.load_state_dict(model.state_dict())
    return made.eval()


def test_attention_gives_what_eager_attention_gives(model: Any) -> None:
    ids = _ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    eager, ours = _with(model, "eager"), _with(model, "fastlm")
    assert ours.config._attn_implementation == "fastlm"
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            want, got = eager(ids, **options).logits, ours(ids, **options).logits
            torch.testing.assert_close(got[:, 4:], want[:, 4:], atol=1e-4, rtol=1e-4)
    want = eager.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0), want)


def test_attention_trains(model: Any) -> None:
    ids = _ids(2, 12)
    grads = []
    for implementation in ("eager", "fastlm"):
        made = _with(model, implementation)
        made(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in made.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-3)


def test_attention_caps_scores_and_slides_its_window() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=0.5,
    )  # fmt: skip
    model = randomized(Gemma2ForCausalLM(config))
    ids = _ids(1, 16)
    with torch.no_grad():
        want = _with(model, "eager")(ids).logits
        torch.testing.assert_close(_with(model, "fastlm")(ids).logits, want, atol=1e-4, rtol=1e-4)
        config.attn_logit_softcapping = None
        assert not torch.allclose(_with(model, "fastlm")(ids).logits, want, atol=1e-3)
