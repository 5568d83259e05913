"""GGUF files: the same logits as transformers on the same weights; whatever is wrong with a file is said clearly."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import VOCAB, gpt2, llama, qwen2, write
from logits import mean_kl
from torch import Tensor

from fastlm import checkpoints
from fastlm.checkpoints import CheckpointError, load_gguf
from fastlm.checkpoints.gguf import GGUFFile
from fastlm.models import CausalLM
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.ops.quantized import QuantizedTensor

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


@torch.no_grad()
def by_steps(model: CausalLM, tokens: Tensor, prompt: int = 5) -> Tensor:
    """Logits of a row's tokens, read as generation does: a prompt, then one at a time."""
    state = model.make_state(1)
    parts = [model(tokens[:, :prompt], state)]
    parts += [model(tokens[:, t : t + 1], state) for t in range(prompt, tokens.shape[1])]
    return torch.cat(parts, 1)


@torch.no_grad()
def expect_same(model: CausalLM, peer: Any, bound: float = 1e-5) -> None:
    tokens = ids(1, 40)
    expected = peer(tokens).logits
    for found in (model(tokens), by_steps(model, tokens)):
        assert mean_kl(expected, found) < bound
        if bound <= 1e-5:
            assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_logits_equal_transformers(make: Any, kind: str, tmp_path: Path) -> None:
    peer = make()
    found = load_gguf(write(tmp_path / "m.gguf", peer, kind), compute="exact")
    expect_same(found.model, peer)
    projection = found.model.get_submodule("layers.0.mlp.up")
    assert isinstance(projection, Linear if kind == "F32" else QuantizedLinear)
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_fast_is_nearly_exact(kind: str, tmp_path: Path) -> None:
    peer = llama(tie_word_embeddings=True)
    expect_same(load_gguf(write(tmp_path / "m.gguf", peer, kind)).model, peer, bound=5e-3)


def test_tests_can_fail(tmp_path: Path) -> None:
    peer = llama()
    model = load_gguf(write(tmp_path / "m.gguf", peer, "Q8_0"), compute="exact").model
    model.rotary.interleaved = False
    with pytest.raises(AssertionError):
        expect_same(model, peer)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_variants_of_llama(options: dict[str, Any], tmp_path: Path) -> None:
    peer = llama(**options)
    expect_same(load_gguf(write(tmp_path / "m.gguf", peer), compute="exact").model, peer)


def test_rope_scaling(tmp_path: Path) -> None:
    peer = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    expect_same(load_gguf(write(tmp_path / "a.gguf", peer, metadata=keys), compute="exact").model, peer)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    peer = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **llama3})
    plain = 1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
    divisors = (plain / peer.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 7
    path = write(tmp_path / "b.gguf", peer, extra={"rope_freqs.weight": divisors})
    expect_same(load_gguf(path, compute="exact").model, peer)


def test_dtype_expands_to_trainable_parameters(tmp_path: Path) -> None:
    peer = llama()
    path = write(tmp_path / "m.gguf", peer, "Q4_0")
    model = load_gguf(path, dtype=torch.float32).model
    expect_same(model, peer)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.loss(ids(1, 8), ids(1, 8)).backward()
    assert load_gguf(path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    # A kind without kernels can be expanded all the same.
    path = write(tmp_path / "q.gguf", peer, "Q5_1")
    with pytest.raises(CheckpointError, match=r"q\.gguf: tensor 'token_embd.weight' is Q5_1.*float32 expands it"):
        load_gguf(path)
    expect_same(load_gguf(path, dtype=torch.float32).model, peer)


def test_training_does_not_write_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama())
    before = path.read_bytes()
    for dtype in (None, torch.float32):
        model = load_gguf(path, dtype=dtype).model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert path.read_bytes() == before


def test_tokenizer_and_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama(), tokenizer=True)
    found = checkpoints.load(path)
    assert found.tokenizer is not None
    assert found.tokenizer.decode(found.tokenizer.encode("then the…")) == "then the…"
    assert found.tokenizer.stop_ids == {0}
    assert found.tokenizer.chat_template == "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.block_count"] == 2
    assert checkpoints.load(tmp_path).model.config == found.model.config
    assert load_gguf(write(tmp_path / "n.gguf", llama())).tokenizer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"llama.block_count": 3}}, "block_count is 3, but layer 2 has no tensors"),
        ({"metadata": {"llama.block_count": None}}, "key 'llama.block_count' is missing, expected a positive integer"),
        ({"metadata": {"llama.attention.head_count": 0}}, "head_count' is 0, expected a positive integer"),
        ({"metadata": {"llama.attention.head_count": 5}}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"metadata": {"llama.embedding_length": 65}}, "embedding_length is 65, but 'token_embd.weight' is"),
        ({"metadata": {"llama.feed_forward_length": 64}}, r"blk.0.ffn_down.weight is \[64, 96\], expected \[64, 64\]"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "expected a positive number"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn', expected none or linear"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.rope.dimension_count": 7}}, "rotary_dim is 7"),
        ({"extra": {"rope_freqs.weight": np.ones(3, "float32")}}, "3 divisors for 8 frequencies"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(3, "float32")}}, "unexpected blk.0.attn_sinks.weight"),
        ({"without": ("blk.1.ffn_up.weight",)}, "lacks blk.1.ffn_up.weight"),
        ({"without": ("token_embd.weight",)}, "lacks a matrix 'token_embd.weight'"),
    ],
)
def test_models_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama(), **changes)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{message}"):
        load_gguf(path)


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


NUMBER = struct.pack("<II", 4, 7)
PAD = bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read"),
        (b"PK\x03\x04" + PAD, "is no GGUF file: it begins with b'PK"),
        (b"GGUF\x03", "ends at byte 5, within the version"),
        (header(version=1), "version is 1, expected 2 or 3$"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=2**60) + PAD, "claims 1152921504606846976 tensors"),
        (header(keys=2**60) + text("a") + NUMBER, "within the name of key 1 of 1152921504606846976"),
        (header(keys=2) + (text("a") + NUMBER) * 2, "key 'a' occurs twice"),
        (header(keys=1) + text("a") + struct.pack("<II", 99, 7), "key 'a' has the unknown type 99"),
        (header(keys=1) + struct.pack("<Q", 2**63) + PAD, "is 9223372036854775808 bytes long"),
        (header(keys=1) + text("a") + struct.pack("<IQ", 8, 2**63) + PAD, "within key 'a'"),
        (header(keys=1) + text("a") + struct.pack("<IQ", 8, 2) + b"\xff\xfe" + PAD, "key 'a' is not UTF-8"),
        (header(keys=1) + text("a") + struct.pack("<IIQ", 9, 0, 2**50) + PAD, "not plausible"),
        (header(keys=1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 500 + PAD, "not plausible"),
        (header(tensors=1) + info(kind=77) + PAD, "tensor 't' has the unknown quantisation type 77"),
        (header(tensors=1) + info(shape=(2**40, 2**40)) + PAD, "tensor 't'.* within the file's"),
        (header(tensors=1) + info(shape=(33,), kind=2) + PAD, "whole Q4_0 blocks of 32"),
        (header(tensors=1) + info(shape=(0,)) + PAD, r"tensor 't' is \[0\]"),
        (header(tensors=1) + info(shape=()) + PAD, "0 dimensions, expected 1 to 4"),
        (header(tensors=1) + info(offset=16) + PAD, "expected them aligned to 32"),
        (header(tensors=1) + info(offset=2**63) + PAD, "within the file's"),
        (header(tensors=2) + info() * 2 + PAD, "tensor 't' occurs twice"),
        (
            header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 3),
            "alignment is 3, expected a power of two",
        ),
        (header() + PAD, "general.architecture is missing, expected one of gpt2, llama, qwen2"),
        (header(keys=1) + text("general.architecture") + struct.pack("<I", 8) + text("t5"), "'t5', expected one of"),
    ],
)
def test_damaged_structure(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{message}"):
        load_gguf(path)


def one_tensor(path: Path, data: Tensor, kind: int) -> GGUFFile:
    """A file with a matrix of 256 by 1024 of ggml's type `kind`."""
    start = header(tensors=1) + info(shape=(1024, 256), kind=kind)
    path.write_bytes(start + bytes(-len(start) % 32) + data.numpy().tobytes())
    return GGUFFile(path)


def pages_here(tensor: Tensor) -> int:
    """Pages of a mapped tensor that are this process's, by /proc/self/pagemap."""
    first, last = tensor.data_ptr() // 4096, (tensor.data_ptr() + tensor.nbytes) // 4096
    with open("/proc/self/pagemap", "rb") as map:
        map.seek(8 * first)
        return sum(int(entry) >> 63 for entry in np.frombuffer(map.read(8 * (last - first)), np.uint64))


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="not Linux")
def test_pages_that_are_not_needed_any_more_are_given_back(tmp_path: Path) -> None:
    values = torch.randn(256, 1024)
    file = one_tensor(tmp_path / "floats.gguf", values, 0)
    mapped = file.tensor("t")
    assert isinstance(mapped, Tensor) and float(mapped.sum()) != 0 and pages_here(mapped) > 200
    copy = file.resident("t")
    assert isinstance(copy, Tensor) and copy.data_ptr() != mapped.data_ptr() and torch.equal(copy, values)
    assert pages_here(mapped) < 20
    assert torch.equal(mapped, values)  # from the file again

    blocks = QuantizedTensor.quantize(values, "Q8_0")
    weight = one_tensor(tmp_path / "codes.gguf", blocks.data, 8).tensor("t")
    assert isinstance(weight, QuantizedTensor)
    weight.interleaved()
    assert pages_here(weight.data) < 20
    assert torch.equal(weight.data, blocks.data)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: can't be read"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_gguf(tmp_path)


def sound_or_refused(path: Path) -> bool:
    """Loads the file; True if it could. Nothing but CheckpointError may come out; what loads can be run."""
    try:
        model = load_gguf(path).model
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    assert model(torch.zeros(1, 2, dtype=torch.int64)).shape[:2] == (1, 2)
    return True


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama(num_hidden_layers=1), "Q8_0", tokenizer=True)
    content = path.read_bytes()
    places = GGUFFile(path).tensors.values()
    data_begins, end = min(t.offset for t in places), max(t.offset + t.nbytes for t in places)
    assert sound_or_refused(path)
    cuts = {0, 1, 3, 4, 8, 16, 24, data_begins - 1, data_begins, end - 1}
    cuts |= set(np.random.default_rng(0).integers(0, end, 120).tolist())
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        assert not sound_or_refused(path), cut


def test_flipped_bytes_of_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", llama(num_hidden_layers=1), "Q8_0", tokenizer=True)
    content = bytearray(path.read_bytes())
    data_begins = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    random = np.random.default_rng(1)
    tokens = content.index(b"tokenizer.ggml.tokens")
    # All the structure outside the vocabulary, and some places in it.
    places = [*range(tokens + 64), *random.integers(tokens, data_begins, 300).tolist()]
    places += range(content.index(b"tokenizer.ggml.merges"), data_begins, 3)
    sound = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= int(random.choice([0x01, 0x80, 0xFF, 1 << random.integers(8)]))
        path.write_bytes(damaged)
        sound += sound_or_refused(path)
    assert 0 < sound < len(places) / 2
