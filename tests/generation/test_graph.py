"""Decoding on a CUDA device without one: under an emulation of CUDA graphs, and on tensors that only pretend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graphs import CudaGraph, install
from tiny_models import TINY, VOCAB, spread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm import ops
from fastlm.generation import Decoder, SamplingParams, recordings
from fastlm.generation.capture import CaptureError, Refused
from fastlm.generation.graph import Graph, sampling_device
from fastlm.generation.lanes import Lanes
from fastlm.kernels import native
from fastlm.kernels.cpu import attention_decode
from fastlm.models.base import CausalLM
from fastlm.ops.attention_decode import ATTENTION_DECODE, _torch_run
from fastlm.ops.checks import usable_device
from fastlm.ops.registry import Implementation, always

PROMPTS = [[1, 2, 3], [7], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6], [11, 12]]
DEVICE = torch.device("cpu")  # of the emulation
Tokens = list[tuple[int, int, float | None, str | None]]


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> CausalLM:
    return spread(TINY[request.param])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[CudaGraph]:
    """CPU tensors treated as a device's: graphs emulated, torch operations alone, no value looked at."""
    attention_decode.forget()  # what was chosen for a CPU
    monkeypatch.setattr(recordings, "records", lambda device: True)
    monkeypatch.setattr(native.CPU, "module", None)
    monkeypatch.setattr(native.CPU, "error", "not for a device")
    monkeypatch.setattr(ATTENTION_DECODE, "implementations", (Implementation("torch", _torch_run, always),))
    return install(monkeypatch)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that a graph can hold: the likeliest token of logits to which the position adds something."""

    def sample(lanes: Lanes, logits: Tensor) -> Tensor:
        ids = torch.arange(logits.shape[1]) + lanes._positions[:, None]
        return (logits + 2.0 * torch.sin(ids.float() * 1.7)).argmax(-1)

    monkeypatch.setattr(Lanes, "sample", sample)


def _run(
    model: CausalLM, ahead: int, capture: bool, stop: tuple[int, ...] = (), on_device: bool = True, **options: Any
) -> tuple[Tokens, Decoder]:
    """Tokens request by request, and the decoder."""
    decoder = Decoder(model, PROMPTS, SamplingParams.of(seed=3, **options), stop_ids=stop, capture=capture)
    decoder._engine._recordings._samples_on_device = on_device
    tokens = []
    while decoder.active:
        tokens += [(t.row, t.id, t.logprob, t.finish) for t in decoder.step(ahead)]
    return sorted(tokens, key=lambda token: token[0]), decoder


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"logprobs": True}])
def test_a_recorded_forward_pass_with_sampling_on_the_host(
    model: CausalLM, graphs: type[CudaGraph], options: dict[str, Any]
) -> None:
    want, _ = _run(model, 1, False, max_new_tokens=9, **options)
    got, decoder = _run(model, 5, True, on_device=False, max_new_tokens=9, **options)
    assert decoder.why_not_captured is None and got == want
    assert graphs.replays == 7  # the prompt gives one token, recording the second


def test_a_whole_step_is_replayed_ahead_of_the_host(model: CausalLM, graphs: type[CudaGraph], sampler: None) -> None:
    want, _ = _run(model, 1, False, max_new_tokens=24)
    assert len({token for _, token, *_ in want}) > 20
    for ahead in (5, 24):
        got, decoder = _run(model, ahead, True, max_new_tokens=24)
        assert decoder.why_not_captured is None
        assert got == want


def test_steps_beyond_a_stop_are_undone(model: CausalLM, graphs: type[CudaGraph], sampler: None) -> None:
    free, _ = _run(model, 1, False, max_new_tokens=30)
    lasting = {token for row, token, *_ in free if row == 0}
    stop = tuple({token for row, token, *_ in free[:72] if row in (1, 3)} - lasting)
    assert stop
    want, _ = _run(model, 1, False, stop, max_new_tokens=30)
    got, _ = _run(model, 30, True, stop, max_new_tokens=30)
    assert got == want
    assert {finish for *_, finish in got} == {None, "stop", "length"}


@pytest.mark.parametrize("on_device", [False, True])
def test_what_cannot_be_recorded_runs_op_by_op_and_says_why(
    graphs: type[CudaGraph], sampler: None, on_device: bool
) -> None:
    model = spread(TINY["llama"])
    want, _ = _run(model, 1, False, max_new_tokens=6)
    model.layers[1].register_forward_pre_hook(lambda layer, args: args[0].sum().item() and None)
    got, decoder = _run(model, 3, True, on_device=on_device, max_new_tokens=6)
    assert got == want and graphs.replays == 0
    assert decoder.why_not_captured == (
        "CUDA can't record the step: CUDA error: operation not permitted when stream is capturing"
    )


def _counter(graphs: type[CudaGraph], step: Any = None) -> tuple[Graph, Tensor, Tensor]:
    count, seen = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def plain() -> Tensor:
        count.add_(1)
        seen.copy_(count)
        return count * 2.0

    def snapshot() -> Any:
        kept = count.clone()
        return lambda: count.copy_(kept)

    return Graph(DEVICE, step or plain, seen, snapshot), count, seen


def test_a_graph_of_a_counter(graphs: type[CudaGraph]) -> None:
    with pytest.raises(CaptureError, match="refused its input"):
        refused = torch.zeros(1, dtype=torch.int64)
        Graph(DEVICE, lambda: refused.fill_(-1), refused, lambda: lambda: None)
    graph, count, seen = _counter(graphs)
    assert (int(count), int(seen), float(graph.result)) == (1, 1, 2.0)
    assert graph.run(3) == [[2], [3], [4]]
    assert (int(count), float(graph.result)) == (4, 8.0)
    assert graph.run(40, stops=(7,)) == [[5], [6], [7]]
    assert int(count) == 7  # 16 steps ran, and were undone
    assert graph.run(40, stops=(99,)) == [[i] for i in range(8, 48)]
    graph.run(0)
    count.fill_(-5)
    with pytest.raises(Refused, match="refused its input"):
        graph.run(16)
    assert (int(count), float(graph.result)) == (-4, -8.0)  # as after the step that was refused


def test_a_refusal_beyond_a_stop_does_not_count(graphs: type[CudaGraph]) -> None:
    count, seen = torch.full((1,), 6), torch.zeros(1, dtype=torch.int64)

    def down() -> Tensor:
        count.sub_(1)
        seen.copy_(count)
        return count * 2.0

    def snapshot() -> Any:
        kept = count.clone()
        return lambda: count.copy_(kept)

    graph = Graph(DEVICE, down, seen, snapshot)
    assert graph.run(16, stops=(2,)) == [[4], [3], [2]]
    assert int(count) == 2
    with pytest.raises(Refused):
        graph.run(16, stops=(7,))


def test_the_emulation_finds_what_a_graph_does_not_replay(graphs: type[CudaGraph]) -> None:
    python = [0]

    def counts_in_python() -> Tensor:
        python[0] += 1
        return torch.full((1,), float(python[0]))

    graph, _, _ = _counter(graphs, counts_in_python)
    graph.run(3)
    assert float(graph.result) == 2.0  # what it was while recording
    with pytest.raises(CaptureError, match="not permitted"):
        _counter(graphs, lambda: torch.full((1,), torch.ones(1).item()))


class _NoMoving(TorchDispatchMode):
    """Refuses what moves data between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            raise AssertionError(f"{func} moves data between {devices}")
        return result


@pytest.mark.parametrize("width", [1, 4])
def test_a_step_on_a_device_never_waits(model: CausalLM, width: int) -> None:
    def step(rows: Tensor | None) -> Tensor:
        return model.head(model.hidden(lanes.ids, state, rows)).flatten(0, 1)

    # Tensors of the meta device have no values to look at, and run what a device other than the CPU runs. (Fake CUDA
    # tensors can't be indexed where torch was built without CUDA.)
    device = torch.device("meta")
    model = model.to(device)
    with torch.inference_mode():
        state = model.make_state(4, 40)
        lanes = Lanes(3, width, history=30, biased=VOCAB, device=device, sampling=device)
        with native.recording_on_device():
            step(lanes.index)  # tables are made
            with _NoMoving():
                logits = step(lanes.index)
                assert logits.device == device and logits.shape == (3 * width, VOCAB)
                if width == 1:
                    tokens = logits.argmax(-1)
                    ops.offset(tokens, out=lanes.tokens)
                    lanes.feed(tokens)
        assert state.lengths.device == device
        # Outside of a recording it looks at the lengths: this test can fail.
        if state.max_length is not None:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                step(lanes.index)


def test_without_a_device_sampler_the_cpu_samples() -> None:
    if not (native.CUDA.module is not None and torch.cuda.is_available()):
        assert sampling_device(torch.device("cuda")) == torch.device("cpu")
    assert sampling_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_that_torch_cannot_use_is_refused_by_name() -> None:
    assert usable_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert usable_device("cpu") == torch.device("cpu")
    for name in ("cuda:77", "nonsense"):
        with pytest.raises(ValueError, match=f"device: '{name}' cannot be used"):
            fastlm.load(Path(__file__).parent, device=name)
