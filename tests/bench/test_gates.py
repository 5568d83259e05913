"""The benchmark's gates turn red: on logits too far from float32, another perplexity, another text."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import gguf_files
import pytest
import torch
from torch.nn import functional

import fastlm
from bench import models
from bench.case import GateFailed
from bench.gates import Quality, judge_greedy, judge_quality, quality
from bench.worker import OURS, Pool


def texts(count: int = 2, length: int = 300, vocabulary: int = 50) -> tuple[list[torch.Tensor], list[list[int]]]:
    logits = [3 * torch.randn(length, vocabulary) for _ in range(count)]
    return logits, [torch.randint(vocabulary, (length,)).tolist() for _ in range(count)]


def test_quality_is_kl_and_perplexity() -> None:
    logits, ids = texts()
    other = [one + 0.3 * torch.randn_like(one) for one in logits]
    got = quality(logits, other, ids)
    want_kl = functional.kl_div(
        torch.cat(other).double().log_softmax(-1),
        torch.cat(logits).double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    assert got.kl == pytest.approx(float(want_kl))
    for perplexity, whose in ((got.perplexity, other), (got.reference_perplexity, logits)):
        scored = torch.cat([one[:-1] for one in whose]).double()
        want = functional.cross_entropy(scored, torch.cat([torch.tensor(one[1:]) for one in ids]))
        assert perplexity == pytest.approx(math.exp(want))
    assert quality(logits, logits, ids).kl == 0


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (Quality(2e-3, 10.0, 10.0), "mean KL"),
        (Quality(math.nan, 10.0, 10.0), "mean KL"),
        (Quality(1e-4, 10.06, 10.0), "perplexity"),
        (Quality(1e-4, 9.94, 10.0), "perplexity"),
    ],
)
def test_quality_gate_is_red(ours: Quality, message: str) -> None:
    with pytest.raises(GateFailed, match=message):
        judge_quality(ours, 1e-3, "the peer")


def test_quality_gate_is_green() -> None:
    judge_quality(Quality(1e-3, 10.04, 10.0), 1e-3, "the peer")


def test_greedy_gate() -> None:
    judge_greedy([1, 2, 3], [1, 2, 3], [1.0] * 3)
    judge_greedy([1, 9, 9], [1, 2, 3], [1.0, 1e-4, 1.0])  # the reference itself nearly ties there
    with pytest.raises(GateFailed, match="greedy token 1"):
        judge_greedy([1, 9, 3], [1, 2, 3], [1e-4, 1.0, 1e-4])
    with pytest.raises(GateFailed, match="2 greedy tokens"):
        judge_greedy([1, 2], [1, 2, 3], [1.0] * 3)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_converted_file_has_the_same_weights_and_metadata(kind: str, tmp_path: Path) -> None:
    source = gguf_files.write(tmp_path / "source.gguf", gguf_files.llama(), "Q8_0", tokenizer=True)
    models._convert(source, tmp_path / "target.gguf", kind)
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("source", "target"))
    assert {t.name for t in before.tensors} == {t.name for t in after.tensors}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        weights = gguf.dequantize(old.data, old.tensor_type)
        if weights.ndim == 2:
            assert new.tensor_type.name == kind
        expected = gguf.dequantize(gguf.quantize(weights, new.tensor_type), new.tensor_type)
        assert (gguf.dequantize(new.data, new.tensor_type) == expected).all()
    kept = {name: field.contents() for name, field in after.fields.items()}
    for name, field in before.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert kept[name] == field.contents(), name


def test_our_engine_computes_what_the_library_does(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.llama(), "Q8_0")
    lm = fastlm.load(file)
    with Pool(torch.get_num_threads()) as pool:
        worker = pool.get(OURS, file)
        logits = torch.from_numpy(worker.call("logits", [1, 2, 3]))
        assert torch.equal(logits, lm.logits([[1, 2, 3]])[0])
        prompts = [[1, 2, 3], [4, 5, 6]]
        want = lm.generate_ids(prompts, max_new_tokens=5, min_new_tokens=5, temperature=0)
        assert worker.call("generate", prompts, 5) == want
        assert [len(row) for row in worker.call("generate", prompts, 5, 0.9)] == [5, 5]
