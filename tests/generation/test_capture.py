"""Recorded decode steps: replays give what the steps give, and what cannot be replayed is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY, VOCAB, llama, lstm, spread
from torch import Tensor

from fastlm import ops
from fastlm.generation import Decoder, LanguageModel, SamplingParams
from fastlm.generation.capture import Captured, CaptureError
from fastlm.models.base import CausalLM
from fastlm.models.llama import Llama, LlamaConfig

PROMPTS = [[1, 2, 3], [7], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6], [3] * 20, [11, 12]]


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> CausalLM:
    return spread(TINY[request.param])


Tokens = list[tuple[int, int, float | None, str | None]]


def _run(
    model: CausalLM,
    prompts: list[list[int]],
    ahead: int,
    capture: bool,
    stop: tuple[int, ...] = (),
    kv_dtype: torch.dtype | None = None,
    **options: object,
) -> tuple[Tokens, Decoder]:
    params = SamplingParams.of(seed=3, **options)
    decoder = Decoder(model, prompts, params, stop_ids=stop, capture=capture, kv_dtype=kv_dtype)
    tokens = []
    while decoder.active:
        tokens += [(t.row, t.id, t.logprob, t.finish) for t in decoder.step(ahead)]
    return tokens, decoder


OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "top-p": {"top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4, "top_k": 40},
    "bias": {"logit_bias": {3: 2.0, 5: -float("inf")}, "min_p": 0.02},
    "logprobs": {"logprobs": True, "temperature": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "five"])
def test_replays_give_what_the_steps_give(model: CausalLM, prompts: list[list[int]], options: str) -> None:
    want, _ = _run(model, prompts, 1, False, max_new_tokens=20, **OPTIONS[options])
    for ahead in (1, 7):
        got, decoder = _run(model, prompts, ahead, True, max_new_tokens=20, **OPTIONS[options])
        assert decoder.why_not_captured is None
        assert got == want


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_a_cache_of_fewer_bytes_is_replayed(kv_dtype: torch.dtype) -> None:
    model, options = spread(llama), {"max_new_tokens": 20, "temperature": 0.8, "logprobs": True, "kv_dtype": kv_dtype}
    want, _ = _run(model, PROMPTS, 1, False, **options)
    got, decoder = _run(model, PROMPTS, 7, True, **options)
    assert decoder.why_not_captured is None and got == want
    assert got != _run(model, PROMPTS, 7, True, **{**options, "kv_dtype": None})[0]


def test_a_float8_cache_decodes_step_by_step_on_a_cpu() -> None:
    model, options = spread(llama), {"max_new_tokens": 20, "temperature": 0.8, "kv_dtype": torch.float8_e4m3fn}
    want, _ = _run(model, PROMPTS, 1, False, **options)
    got, decoder = _run(model, PROMPTS, 7, True, **options)
    assert got == want and "has no native kernel" in str(decoder.why_not_captured)
    assert got != _run(model, PROMPTS, 7, True, **{**options, "kv_dtype": None})[0]


def test_a_cache_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_dtype: torch\.float16 for a model that computes in torch\.float32"):
        Decoder(spread(llama), PROMPTS, SamplingParams(), kv_dtype=torch.float16)
    with pytest.raises(ValueError, match="a recurrent model has no KV cache"):
        LanguageModel(spread(lstm), kv_dtype=torch.int8)


def test_rows_that_end_leave_the_recording(model: CausalLM) -> None:
    options = {"max_new_tokens": 24, "temperature": 3.0}
    free, _ = _run(model, PROMPTS, 1, False, **options)
    lasting = {token for row, token, _, _ in free if row == 0}
    stop = tuple({token for row, token, _, _ in free[:60] if row in (1, 3)} - lasting)
    want, _ = _run(model, PROMPTS, 1, False, stop, **options)
    got, decoder = _run(model, PROMPTS, 9, True, stop, **options)
    assert decoder.why_not_captured is None and got == want
    assert {finish for _, _, _, finish in got} == {None, "stop", "length"}


def test_stop_tokens_wait_for_min_new_tokens(model: CausalLM) -> None:
    greedy, _ = _run(model, PROMPTS[:2], 1, False, max_new_tokens=12, temperature=0)
    stop = (greedy[6][1], greedy[9][1])
    options = {"max_new_tokens": 12, "min_new_tokens": 7, "temperature": 0}
    want, _ = _run(model, PROMPTS[:2], 1, False, stop, **options)
    got, _ = _run(model, PROMPTS[:2], 5, True, stop, **options)
    assert got == want and not {token for _, token, _, _ in got[:14]} & set(stop)


def test_a_full_context_ends_a_replay() -> None:
    torch.manual_seed(5)
    model = llama().eval()
    prompts = [[1] * 58, [2] * 50]
    want, _ = _run(model, prompts, 1, False, max_new_tokens=40)
    got, _ = _run(model, prompts, 40, True, max_new_tokens=40)
    assert got == want
    ends = {row: (sum(r == row for r, *_ in got), finish) for row, _, _, finish in got if finish}
    assert ends == {0: (7, "context"), 1: (15, "context")}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(model: CausalLM, threads: int) -> None:
    want, _ = _run(model, PROMPTS, 4, True, max_new_tokens=10)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert _run(model, PROMPTS, 4, True, max_new_tokens=10)[0] == want
        decoder = Decoder(model, PROMPTS, SamplingParams(max_new_tokens=10, seed=3))
        got = [*decoder.step(), *decoder.step()]
        torch.set_num_threads(1)  # fewer than it was recorded with
        while decoder.active:
            got += decoder.step(3)
        assert [(t.row, t.id, t.logprob, t.finish) for t in got] == want
    finally:
        torch.set_num_threads(before)


def test_quantised_weights_are_replayed(isa: str) -> None:
    from fastlm.nn.linear import QuantizedLinear

    torch.manual_seed(5)
    model = llama(hidden_size=64, intermediate_size=96).eval()
    for layer in model.layers:
        for parent, name in [(layer.attention, n) for n in ("query", "key", "value", "output")] + [
            (layer.mlp, n) for n in ("gate", "up", "down")
        ]:
            weight = getattr(parent, name).weight.detach()
            setattr(parent, name, QuantizedLinear(ops.QuantizedTensor.quantize(weight * 4, "Q4_1")))
    want, _ = _run(model, PROMPTS, 1, False, max_new_tokens=12)
    got, decoder = _run(model, PROMPTS, 6, True, max_new_tokens=12)
    assert decoder.why_not_captured is None and got == want


class Doubled(Llama):
    """A model whose author has used an operation of torch's."""

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) * 2


def test_what_cannot_be_recorded_runs_op_by_op() -> None:
    torch.manual_seed(5)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    model = Doubled(LlamaConfig(vocab_size=VOCAB, context_length=64, **sizes)).eval()
    want, decoder = _run(model, PROMPTS, 1, False, max_new_tokens=9)
    assert decoder.why_not_captured == "capture=False"
    got, decoder = _run(model, PROMPTS, 4, True, max_new_tokens=9)
    assert got == want and decoder.why_not_captured is not None and "aten.mul" in decoder.why_not_captured
    with ops.backend("reference"):
        assert _run(llama().eval(), PROMPTS, 4, True, max_new_tokens=3)[1].why_not_captured == "a backend is forced"


def test_a_kernel_that_cannot_be_replayed_says_so() -> None:
    count, step = _counter()
    lstm = [torch.randn(16, 4), torch.randn(16, 4)]
    inputs = torch.randn(3, 1, 4)
    states = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    with torch.inference_mode(), pytest.raises(CaptureError, match=r"(lstm_forward|evenness) can't be replayed|aten"):
        Captured(lambda: (step(), ops.lstm(inputs, states, lstm, bias=False)), count)
    assert Captured(step, count).run(1)


def test_nan_logits_in_the_middle_of_a_replay_are_an_error() -> None:
    torch.manual_seed(5)
    model = llama().eval()
    decoder = Decoder(model, PROMPTS[:2], SamplingParams(max_new_tokens=30, seed=1))
    decoder.step(), decoder.step()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)  # in place: the recorded step reads it
    with pytest.raises(ValueError, match="row 0"):
        decoder.step(8)


def _counter() -> tuple[Tensor, Callable[[], None]]:
    count = torch.zeros(1, dtype=torch.int64)
    return count, lambda: ops.offset(count, 1, out=count)


def test_a_captured_step_runs_once_and_then_when_asked() -> None:
    count, step = _counter()
    captured = Captured(step, count)
    assert count.item() == 1
    assert captured.run(3) == [[2], [3], [4]] and count.item() == 4
    assert captured.run(9, stops=[6]) == [[5], [6]]
    assert captured.run(0) == []


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("aten.mul", lambda x: x * 2),
        ("aten.add", lambda x: x + 1),
        ("aten.add", lambda x: x.t() + x.t()),
        ("aten.clone", lambda x: x.clone()),
        ("aten._local_scalar_dense", lambda x: x[0, 0].item()),
        ("aten.arange", lambda x: torch.arange(3)),
        ("aten.zeros", lambda x: torch.zeros(3)),
        ("aten.lift_fresh", lambda x: torch.tensor([1.0])),
    ],
)
def test_other_torch_operations_are_refused_by_name(name: str, operation: Callable[[Tensor], object]) -> None:
    count, step = _counter()
    x = torch.randn(4, 5)

    def both() -> None:
        step()
        operation(x)

    with pytest.raises(CaptureError, match=name if name != "aten.add" else "add"):
        Captured(both, count)
    assert torch.equal(x * 2, x + x)  # the mode and the recording are off again
    assert Captured(step, count).run(1) == [[3]]


def test_a_team_shares_light_work_that_single_calls_do_not() -> None:
    x, other, watched = torch.randn(7, 768), torch.randn(7, 768), torch.zeros(1, dtype=torch.int64)
    cos, sin = torch.randn(7, 32), torch.randn(7, 32)

    def step() -> Tensor:
        y = ops.swiglu(ops.rms_norm(x), other)
        turned = ops.rotary(y.view(1, 7, 12, 64).transpose(1, 2), cos, sin)
        return turned + x.view(1, 12, 7, 64)

    captured = Captured(step, watched)
    x.normal_()
    captured.result.fill_(float("nan"))
    captured.run(1)
    assert torch.equal(captured.result, step())


def test_translated_operations_are_replayed() -> None:
    count, step = _counter()
    table, state = torch.randn(6, 3), torch.zeros(4, 3)
    rows = torch.tensor([2, 0])
    ids = count.view(1, 1)

    def body() -> None:
        step()
        x = torch.nn.functional.embedding(ids, table).view(1, 3)
        y = state.index_select(0, rows)
        state.index_copy_(0, rows, y + y)
        state[1:2] = x

    with torch.inference_mode():
        captured = Captured(body, count)
        state[2] = 1.0
        captured.run(3)
    assert torch.equal(state[1], table[4]) and state[2].tolist() == [8.0] * 3
    assert state[0].tolist() == state[3].tolist() == [0.0] * 3
