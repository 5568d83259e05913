"""Token files and batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import ContiguousBatches, DataError, TokenFile, Tokenizer, encode_to_file, random_blocks, tokens

BYTE = Tokenizer.byte()


def test_file_holds_the_tokens(tmp_path: Path) -> None:
    texts = ["first\n", "", "second é", "third"]
    file = encode_to_file(texts, BYTE, tmp_path / "deep" / "a.tokens")
    assert file.tokens.tolist() == [id for text in texts if text for id in (*text.encode(), 256)]
    assert file.tokens.dtype == np.uint16
    assert file.starts.tolist() == [0, 7, 17]
    assert (file.vocab_size, file.fingerprint) == (257, BYTE.fingerprint)
    file.verify()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.tokens"]
    bare = encode_to_file(texts, BYTE, tmp_path / "b.tokens", end_of_text=False)
    assert bytes(bare.tokens.tolist()) == "".join(texts).encode()


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    characters = [chr(code) for code in range(0x10000, 0x10000 + 70_000)]
    tokenizer = Tokenizer.character(["".join(characters)])
    file = encode_to_file([characters[-1]], tokenizer, tmp_path / "a")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [70_000, 70_001]


def test_texts_are_streamed(tmp_path: Path) -> None:
    sizes: list[int] = []

    def texts() -> object:
        for _ in range(50):
            yield "x" * 20_000
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    seen: list[tuple[int, int]] = []
    encode_to_file(texts(), BYTE, tmp_path / "a", progress=lambda *counts: seen.append(counts))  # type: ignore[arg-type]
    assert sizes[25] > 15 * 20_000 * 2  # on its way to the disk before the last text is asked for
    assert seen[-1] == (1_000_000, 1_000_050)


def test_failing_texts_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    encode_to_file(["old"], BYTE, path)

    def breaking() -> object:
        yield "new"
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        encode_to_file(breaking(), BYTE, path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the texts are empty"):
        encode_to_file([""], BYTE, path)
    assert bytes(TokenFile(path).tokens[:-1].tolist()) == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "with_name", lambda self, name: tmp_path / "full")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"a: can't be written: the disk is full"):
        encode_to_file(["x" * 100_000], BYTE, tmp_path / "a")


def damage(path: Path, kind: str) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "truncated":
        raw = raw[:-5]
    elif kind == "longer":
        raw += b"xx"
    elif kind == "short":
        raw = raw[:100]
    elif kind == "magic":
        raw[0] ^= 1
    elif kind == "header":
        raw[8:20] = b"not json at."
    elif kind == "dtype":
        header = json.loads(raw[8 : tokens.HEADER])
        raw[8 : tokens.HEADER] = json.dumps({**header, "dtype": "object"}).encode().ljust(tokens.HEADER - 8)
    elif kind == "empty":
        raw = bytearray()
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated: .* bytes, and its header promises"),
        ("longer", "damaged: .* bytes, and its header promises"),
        ("short", "truncated: 100 bytes"),
        ("magic", "not a token file"),
        ("header", "damaged header"),
        ("dtype", "damaged header: dtype is 'object'"),
        ("empty", "not a token file"),
    ],
)
def test_damaged_files_are_named(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    encode_to_file(["some text"], BYTE, path)
    damage(path, kind)
    with pytest.raises(DataError, match=rf"a\.tokens: {message}"):
        TokenFile(path)


def test_flipped_bit_fails_verification(tmp_path: Path) -> None:
    path = tmp_path / "a"
    encode_to_file(["some text"], BYTE, path)
    raw = bytearray(path.read_bytes())
    raw[tokens.HEADER + 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged: checksum"):
        TokenFile(path).verify()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.tokens: can't be read: No such file"):
        TokenFile(tmp_path / "nothing.tokens")


def test_split(tmp_path: Path) -> None:
    file = encode_to_file(["a" * 59, "b" * 29, "c" * 9], BYTE, tmp_path / "a")  # 60 + 30 + 10 with their ends
    train, held_out = file.split(0.2)
    assert (len(train), len(held_out)) == (80, 20)
    train, held_out = file.split(0.2, by="document")
    assert (len(train), len(held_out)) == (90, 10)
    assert held_out.tolist() == [ord("c")] * 9 + [256]
    train, held_out = file.split(0.4, by="document")
    assert (len(train), len(held_out)) == (60, 40)
    assert np.concatenate([train, held_out]).tolist() == file.tokens.tolist()
    with pytest.raises(ValueError, match=r"validation: 1\.5"):
        file.split(1.5)
    with pytest.raises(ValueError, match="by: 'head'"):
        file.split(0.1, by="head")
    with pytest.raises(DataError, match="one text alone"):
        encode_to_file(["a"], BYTE, tmp_path / "b").split(0.5, by="document")


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_random_blocks_depend_on_seed_and_step_alone(kind: str) -> None:
    stream = np.arange(1000, dtype=np.uint16)
    source = stream if kind == "array" else torch.from_numpy(stream.astype(np.int32))
    inputs, targets = random_blocks(source, 8, 4, seed=1, step=7)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs - inputs[:, :1], torch.arange(8).expand(4, 8))
    assert torch.equal(random_blocks(source, 8, 4, seed=1, step=7)[0], inputs)
    assert not torch.equal(random_blocks(source, 8, 4, seed=1, step=8)[0], inputs)
    assert not torch.equal(random_blocks(source, 8, 4, seed=2, step=7)[0], inputs)


def test_random_blocks_reach_every_start_equally() -> None:
    starts = torch.cat([random_blocks(np.arange(20), 9, 50, seed=0, step=step)[0][:, 0] for step in range(40)])
    counts = torch.bincount(starts, minlength=11)
    assert counts.shape == (11,)  # 0 to 10: the last target is the last token
    chi_square = float(((counts - 2000 / 11) ** 2 / (2000 / 11)).sum())
    assert chi_square < 29.6  # 0.1 % at 10 degrees of freedom


@given(count=st.integers(3, 200), block=st.integers(1, 10), batch=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_contiguous_batches_go_on_where_they_stopped(count: int, block: int, batch: int) -> None:
    stream = np.arange(count)
    if count < batch * block + 1:
        with pytest.raises(ValueError, match=f"tokens: {count} are too few"):
            ContiguousBatches(stream, block, batch)
        return
    batches = ContiguousBatches(stream, block, batch)
    seen = []
    for step in range(len(batches)):
        inputs, targets, starts_over = batches[step]
        assert inputs.shape == (batch, block)
        assert torch.equal(targets, inputs + 1)
        assert starts_over == (step == 0)
        seen.append(inputs)
    rows = torch.cat(seen, dim=1)
    assert torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1]))  # each row is one run of the stream
    assert len(rows.unique()) == rows.numel()  # and no token is seen twice
    assert rows.numel() > count - 1 - batch * (block + 1)
    again = batches[len(batches)]
    assert again.starts_over
    assert torch.equal(again.inputs, seen[0])


def test_batch_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tokens: 5 are too few for block 5 and batch 1: 6 are needed"):
        random_blocks(np.arange(5), 5, 1, 0, 0)
    with pytest.raises(ValueError, match="block: 0"):
        ContiguousBatches(np.arange(5), 0, 1)
    with pytest.raises(IndexError, match="step: -1"):
        ContiguousBatches(np.arange(5), 1, 1)[-1]
