"""Our token ids against llama.cpp's and transformers', for the same files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_strings import INVALID_UTF8, STRINGS
from tokenizers import decoders, models, pre_tokenizers

from fastlm.data import DataError, Tokenizer, tokenizer_gguf

BOS, EOS = "<|endoftext|>", "<|im_end|>"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

# Text that joins what hypothesis finds interesting with what real text is made of.
TEXT = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(STRINGS)), max_size=4).map("".join)


def metadata_of(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        quiet, saved = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(quiet, 2)  # it writes to the descriptor itself
        try:
            self.model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        finally:
            os.dup2(saved, 2)
            os.close(quiet)
            os.close(saved)

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return self.model.tokenize(data, add_bos=False, special=special)


# The real model


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(metadata_of(smollm2_gguf))


@pytest.fixture(scope="module")
def smollm2_llama_cpp(smollm2_gguf: Path) -> LlamaCpp:
    return LlamaCpp(smollm2_gguf)


@pytest.mark.model
def test_smollm2_agrees_with_llama_cpp(smollm2: Tokenizer, smollm2_llama_cpp: LlamaCpp) -> None:
    for text in [*STRINGS, *INVALID_UTF8]:
        for special in (False, True):
            assert smollm2.encode(text, parse_special=special) == smollm2_llama_cpp.encode(text, special), text
    source = Path(tokenizer_gguf.__file__).read_text()
    assert smollm2.encode(source) == smollm2_llama_cpp.encode(source)


@pytest.mark.model
@given(text=TEXT)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_smollm2_agrees_with_llama_cpp_on_anything(smollm2: Tokenizer, smollm2_llama_cpp: LlamaCpp, text: str) -> None:
    assert smollm2.encode(text) == smollm2_llama_cpp.encode(text)
    known = set(b"".join(map(smollm2.token_bytes, range(smollm2.vocab_size))))
    if known.issuperset(text.encode()):  # its vocabulary lacks a few bytes
        assert smollm2.decode(smollm2.encode(text)) == text


@pytest.mark.model
def test_smollm2_agrees_with_transformers(smollm2: Tokenizer, smollm2_gguf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # What transformers makes of the GGUF file does not split numbers from the space before them, as the model's own
    # tokenizer and llama.cpp do. It shows only with numbers other than 0 to 9, which have merges.
    for text in [text for text in STRINGS if "½" not in text]:
        expected = theirs(text, add_special_tokens=True).input_ids
        assert smollm2.encode(text, add_special_tokens=True, parse_special=True) == expected, text
        assert smollm2.decode(expected, skip_special_tokens=False) == theirs.decode(expected), text
    messages = [
        {"role": "user", "content": "Hi 12"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert smollm2.encode_chat(messages) == expected
    assert (smollm2.bos_id, smollm2.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert smollm2.vocab_size == len(theirs)


# Every way of splitting words, on files made here


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """A trained byte-level BPE as GGUF metadata."""
    tokenizer = Tokenizer.train_bpe([*STRINGS, Path(tokenizer_gguf.__file__).read_text()] * 3, 900)
    model = json.loads(tokenizer._backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    added = [BOS, "<|im_start|>", EOS, "<user defined>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens + added,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3, 4],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
        "tokenizer.chat_template": CHAT,
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", sorted(tokenizer_gguf._RULE))
def test_word_splits_agree_with_llama_cpp(pre: str, bpe: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {**bpe, "tokenizer.ggml.pre": pre})
    ours, theirs = Tokenizer.from_gguf(metadata_of(path)), LlamaCpp(path)
    different = [
        text
        for text in [*STRINGS, *INVALID_UTF8, "x<user defined>y"]
        for special in (False, True)
        if ours.encode(text, parse_special=special) != theirs.encode(text, special)
    ]
    assert different == []
    for text in STRINGS:
        assert ours.decode(ours.encode(text)) == text


def test_fingerprints_tell_word_splits_apart(bpe: dict[str, Any]) -> None:
    rules = tokenizer_gguf._PATTERNS
    prints = {Tokenizer.from_gguf({**bpe, "tokenizer.ggml.pre": pre}).fingerprint for pre in rules}
    assert len(prints) == len(rules)


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    """A small vocabulary in the form of Llama 2's: pieces with scores, and 256 bytes to fall back on."""
    words = [
        "▁the",
        "▁cat",
        "▁sat",
        "on",
        "▁on",
        "at",
        "he",
        "▁t",
        "ca",
        "▁c",
        "in",
        "ing",
        "▁ther",
        "there",
        "er",
        "re",
    ]
    words += ["▁▁", "▁▁▁▁", "你好", "é", "Pr", "При", "12", "ll", "llo"]
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz0123456789.,'!\n"))
    pieces = list(dict.fromkeys([*words, *letters]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|im_end|>", "<tool>"]
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))] + [0.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 4],
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_agrees_with_llama_cpp(prefix: bool, sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    metadata = {**sentencepiece, "tokenizer.ggml.add_space_prefix": prefix}
    path = write_gguf(tmp_path / "a.gguf", metadata)
    ours, theirs = Tokenizer.from_gguf(metadata_of(path)), LlamaCpp(path)
    for text in [*STRINGS, "the cat sat on there", "thethethe", "a<tool>b", "<s>the</s> cat<|im_end|>the", "你好吗"]:
        for special in (False, True):
            assert ours.encode(text, parse_special=special) == theirs.encode(text, special), (text, special)
        if "<" not in text:
            assert ours.decode(ours.encode(text)) == text
    assert ours.encode("the", add_special_tokens=True)[0] == ours.bos_id == 1
    assert (ours.eos_id, ours.unk_id, ours.adds_bos) == (2, 0, True)
    assert ours.stop_ids == {2, ours.encode("<|im_end|>", parse_special=True)[-1]}
    assert ours.token_bytes(ours.encode("☃")[-1]) == "☃".encode()[-1:]


@pytest.mark.parametrize("seed", range(4))
def test_random_sentencepiece_vocabularies_agree_with_llama_cpp(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    letters = "abcd\u2581é"
    pieces = set(letters)
    while len(pieces) < 40:  # overlapping, so that the order of merging decides
        pieces.add("".join(rng.choices(letters, k=rng.randint(2, 6))))
    order = rng.sample(sorted(pieces), len(pieces))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *order],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(order))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(order),
    }
    ours, theirs = Tokenizer.from_gguf(metadata), LlamaCpp(write_gguf(tmp_path / "a.gguf", metadata))
    for _ in range(200):
        text = "".join(rng.choices("abcd é☃", k=rng.randint(0, 14)))
        assert ours.encode(text) == theirs.encode(text), text


def test_gguf_tokenizers_survive_saving(bpe: dict[str, Any], sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    for metadata in ({**bpe, "tokenizer.ggml.pre": "llama-bpe"}, sentencepiece):
        tokenizer = Tokenizer.from_gguf(metadata)
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        for text in STRINGS:
            ids = tokenizer.encode(text, add_special_tokens=True, parse_special=True)
            assert loaded.encode(text, add_special_tokens=True, parse_special=True) == ids
            assert loaded.decode(ids) == tokenizer.decode(ids)
        for name in ("bos_id", "eos_id", "unk_id", "stop_ids", "adds_bos", "chat_template"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "martian"}, r"tokenizer\.ggml\.pre: 'martian' is not a known way .*known: .*gpt-2"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model: 'bert' is not supported"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens: not in the file"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, r"tokenizer\.ggml\.token_type: \d+ entries for 3 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' occurs twice"),
        ({"tokenizer.ggml.merges": ["q zzzz"]}, r"tokenizer\.ggml\.merges: 'q zzzz' joins or makes"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, r"tokenizer\.ggml\.eos_token_id: 1000000, expected 0 to"),
    ],
)
def test_damaged_metadata_is_named(change: dict[str, Any], message: str, bpe: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=message):
        Tokenizer.from_gguf({**bpe, **change})


# Hugging Face folders


@pytest.fixture(scope="module")
def gpt2_folder(bpe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's own layout: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = [*bpe["tokenizer.ggml.tokens"][:-4], BOS]
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(bpe["tokenizer.ggml.merges"]) + "\n")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.mark.parametrize("layout", ["vocab and merges", "tokenizer.json"])
def test_gpt2_folder_agrees_with_transformers(layout: str, gpt2_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(gpt2_folder)
    folder = gpt2_folder
    if layout == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        folder = tmp_path
    ours = Tokenizer.from_hf(folder)
    for text in [*STRINGS, *(data.decode(errors="replace") for data in INVALID_UTF8)]:
        expected = theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=True, parse_special=True) == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected), text
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_token_id, theirs.eos_token_id, None)
    assert ours.vocab_size == len(theirs)
    assert ours.stop_ids == {ours.eos_id}


def test_llama_folder_agrees_with_transformers(sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    Tokenizer.from_gguf(sentencepiece).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["fastlm"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 300]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_hf(tmp_path)
    for text in STRINGS:
        expected = theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=True, parse_special=True) == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected), text
        if "<unk>" not in text:  # they leave it out, we mark it
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text
    assert ours.adds_bos
    assert {2, 300} < ours.stop_ids
    assert ours.apply_chat_template([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"
    for added in (False, True):  # tokenizer.json says what is added, whatever the configuration says
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": added}))
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids
        assert Tokenizer.from_hf(tmp_path).encode("the cat", add_special_tokens=True) == expected


@pytest.mark.parametrize("scheme", ["always", "never", "first"])
def test_metaspace_decodes_as_the_library_does(scheme: str, tmp_path: Path) -> None:
    letters = sorted({*"".join(STRINGS), "\u2581"})
    backend = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_hf(tmp_path)
    for text in STRINGS:
        ids = backend.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == backend.decode(ids)


def test_truncation_and_padding_in_the_file_are_ignored(gpt2_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_hf(gpt2_folder)
    tokenizer.save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    whole["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None} | {
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    loaded = Tokenizer.load(tmp_path)
    for text in STRINGS:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_ids_are_plain_integers(bpe: dict[str, Any]) -> None:
    """GGUF readers hand out numpy's numbers."""
    keys = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    numbers = {key: np.uint32(bpe[key]) for key in keys}
    tokenizer = Tokenizer.from_gguf({**bpe, **numbers, "tokenizer.ggml.pre": "gpt-2"})
    assert type(tokenizer.bos_id) is type(tokenizer.eos_id) is int
