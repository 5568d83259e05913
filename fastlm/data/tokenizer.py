"""Text to token ids and back, over the `tokenizers` library.

Two rules hold for every kind:

* `token_bytes` is byte-exact, and `decode` is its concatenation, so text can be streamed token by token. Where a
  byte-level vocabulary has all 256 bytes, `decode(encode(text)) == text` for any text; some models' lack bytes that
  hardly occur (SmolLM2's has no 0xF1), and drop them as they were trained to.
* Text is only text. `encode("<|im_end|>")` gives the characters' tokens; the control token comes out only with
  `parse_special=True`, or from `encode_chat`, where the template's markers count and those in messages don't.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fastlm.data.chat import hide_markers, render_chat
from fastlm.data.errors import DataError
from fastlm.data.token_bytes import BYTE_OF, EACH_BYTE, byte_table, surroundings

__all__ = ["GPT2_PATTERN", "Tokenizer"]

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

# Radford et al., 2019: contractions, then words, numbers and the rest, each with the space before it; then whitespace.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Control tokens that end a turn or a text in the models people use, whatever else the file calls its eos.
END_OF_TURN = frozenset(
    ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<EOT>")
)


class Tokenizer:
    """A tokenizer with what a language model needs to know of it.

    Make one with `byte`, `character`, `word`, `train_bpe`, `from_hf` (= `load`) or `from_gguf`.

    Attributes:
        kind: "byte", "character", "word", "bpe", "hf" or "gguf": where it came from.
        vocab_size: number of ids.
        bos_id, eos_id, unk_id: None where there is none.
        stop_ids: tokens that end generation: eos and end-of-turn tokens.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        kind: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        unk_id: int | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._lock = threading.Lock()  # the library's switch for special tokens is per object, not per call
        self.kind = kind
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self.bos_id = self._checked("bos_id", bos_id)
        self.eos_id = self._checked("eos_id", eos_id)
        self.unk_id = self._checked("unk_id", unk_id)
        ends = {id for id, text in self._special.items() if text in END_OF_TURN}
        self.stop_ids = frozenset({*stop_ids, *ends, *([] if eos_id is None else [eos_id])})
        self.chat_template = chat_template
        self._prefix, self._suffix = surroundings(backend)
        self._bytes, self._strip_space = byte_table(backend, vocab, self.vocab_size)
        for id, token in added.items():
            self._bytes[id] = b"" if token.special else token.content.encode()
        if self.unk_id is not None:
            self._bytes[self.unk_id] = "\ufffd".encode()
        # Bytes and characters need no more than a look-up, which is 20 times faster than the library.
        self._characters = vocab if kind == "character" else None
        plain = backend.get_vocab(with_added_tokens=False).keys() - self._special.values()
        if (kind == "byte" and any(vocab.get(character) != byte for character, byte in BYTE_OF.items())) or (
            kind == "character" and (UNKNOWN not in vocab or any(len(token) != 1 for token in plain))
        ):
            raise DataError(f"kind: {kind!r}, and the vocabulary is not one of single {kind}s")

    def _checked(self, name: str, id: int | None) -> int | None:
        if id is not None and not 0 <= id < self.vocab_size:
            raise DataError(f"{name}: {id}, expected an id below the vocabulary's {self.vocab_size}")
        return id

    # Made here

    @classmethod
    def byte(cls) -> Tokenizer:
        """Each UTF-8 byte is its own id, 0 to 255; 256 is the end of a text. Nothing is unknown."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls._with_end(backend, "byte")

    @classmethod
    def character(cls, texts: Iterable[str], *, min_count: int = 1) -> Tokenizer:
        """Each character that occurs `min_count` times in `texts` has an id; others are unknown.

        Raises:
            DataError: `texts` hold no character that often.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        kept = sorted(character for character, count in counts.items() if count >= min_count)
        if not kept:
            raise DataError(f"texts: no character occurs {min_count} times; is the text empty?")
        vocab = {UNKNOWN: 0, **{character: index for index, character in enumerate(kept, start=1)}}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
        backend.decoder = decoders.Fuse()
        return cls._with_end(backend, "character")

    @classmethod
    def word(cls, texts: Iterable[str], *, max_vocab: int = 10_000, min_count: int = 1) -> Tokenizer:
        """Words, numbers, punctuation and runs of whitespace, each with the space before it, as in GPT-2's pattern.

        The `max_vocab` most frequent that occur at least `min_count` times have ids (two of them are "<unk>" and the
        end of a text); the rest are unknown. Decoding is exact where nothing is.

        Raises:
            DataError: `texts` are empty, or `max_vocab` leaves no room for a word.
        """
        if max_vocab < 3:
            raise DataError(f"max_vocab: {max_vocab}, expected 3 or more (unknown, end of text, and a word)")
        backend = tokenizers.Tokenizer(models.WordLevel(vocab={UNKNOWN: 0}, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
        backend.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(
            vocab_size=max_vocab - 1, min_frequency=min_count, special_tokens=[UNKNOWN], show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() < 2:
            raise DataError(f"texts: no word occurs {min_count} times; is the text empty?")
        return cls._with_end(backend, "word")

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, *, min_count: int = 2) -> Tokenizer:
        """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) learnt from `texts`: nothing is unknown.

        Args:
            texts: read once, in a stream; memory grows with the number of distinct words.
            vocab_size: at most so many ids; 256 bytes, the end of a text, and merges.
            min_count: merge pairs that occur this often.

        Raises:
            DataError: `vocab_size` is below 257, or `texts` are empty.
        """
        if vocab_size < 257:
            raise DataError(f"vocab_size: {vocab_size}, expected 257 or more: 256 bytes and the end of a text")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=min_count,
            initial_alphabet=sorted(BYTE_OF),
            show_progress=False,
        )
        characters = 0

        def counted() -> Iterable[str]:
            nonlocal characters
            for text in texts:
                characters += len(text)
                yield text

        backend.train_from_iterator(counted(), trainer)
        if not characters:
            raise DataError("texts: empty, there is nothing to learn from")
        return cls._with_end(backend, "bpe")

    @classmethod
    def _with_end(cls, backend: tokenizers.Tokenizer, kind: str) -> Tokenizer:
        unk = backend.token_to_id(UNKNOWN) if kind in ("character", "word") else None
        special = [END_OF_TEXT] if unk is None else [END_OF_TEXT, UNKNOWN]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        return cls(backend, kind=kind, eos_id=backend.token_to_id(END_OF_TEXT), unk_id=unk)

    # Found in a checkpoint

    @classmethod
    def from_hf(cls, folder: str | Path) -> Tokenizer:
        """A Hugging Face folder's: tokenizer.json, or GPT-2's vocab.json with merges.txt; with its configuration.

        Raises:
            DataError: neither is there, a file is damaged, or the tokenizer is of a kind that can't be decoded exactly.
        """
        from fastlm.data.tokenizer_hf import read_folder

        return cls(**read_folder(Path(folder)))

    load = from_hf

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """A GGUF file's: `metadata` maps its keys ("tokenizer.ggml.tokens", ...) to Python values.

        Raises:
            DataError: no tokenizer in the file, its parts don't fit together, or it is of an unsupported kind.
        """
        from fastlm.data.tokenizer_gguf import read_metadata

        return cls(**read_metadata(metadata))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self._text(self.bos_id),
            "eos_token": self._text(self.eos_id),
            "unk_token": self._text(self.unk_id),
            "chat_template": self.chat_template,
            "fastlm": {"kind": self.kind, "stop_ids": sorted(self.stop_ids)},
        }
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    # Text to ids

    def encode(self, text: str | bytes, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """The text's token ids.

        Args:
            text: bytes are UTF-8; each invalid byte becomes U+FFFD, as in llama.cpp's BPE (the byte kind keeps it).
            add_special_tokens: put the tokens around the text that the model expects (often a bos, often nothing).
            parse_special: "<|im_end|>" and the like in `text` become control tokens. Never for text from strangers.

        Raises:
            DataError: a str with a lone surrogate, which no UTF-8 stands for.
        """
        if not isinstance(text, bytes):
            ids = self._encode(text, parse_special)
        elif self.kind == "byte" and not parse_special:
            ids = list(text)
        else:
            ids = self._encode(text.decode("utf-8", errors=EACH_BYTE), parse_special)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        try:
            if self.kind == "byte" and not parse_special:
                return list(text.encode())
            if self._characters is not None and not parse_special:
                known, unknown = self._characters, self._characters[UNKNOWN]
                return [known.get(character, unknown) for character in text]
            with self._lock:
                self._backend.encode_special_tokens = not parse_special
                return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            if not isinstance(text, str):
                raise TypeError(f"text: {type(text).__name__}, expected str or bytes") from None
            at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if at is None:
                raise
            raise DataError(
                f"text: lone surrogate U+{ord(text[at]):04X} at character {at} has no UTF-8; "
                "pass bytes, or text.encode('utf-8', 'replace').decode()"
            ) from None

    # Ids to text

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text: b"" for control tokens, part of a character for some."""
        if not 0 <= id < self.vocab_size:
            raise DataError(f"id: {id}, expected 0 to {self.vocab_size - 1}")
        return self._bytes[id]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 and the unknown token become U+FFFD.

        Sentencepiece models put a space before a text; it is removed again here (but not by `token_bytes`, which
        knows no beginning).
        """
        pieces = [
            self._special[id].encode() if not skip_special_tokens and id in self._special else self.token_bytes(id)
            for id in map(int, ids)
        ]
        data = b"".join(pieces)
        if self._strip_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    @property
    def adds_bos(self) -> bool:
        """Whether `add_special_tokens` begins the text with bos."""
        return self.bos_id is not None and self.bos_id in self._prefix

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of what it makes of its own tokens' text; equal for equal tokenizers.

        Unlike tokenizer.json, these don't change with the library's version.
        """
        vocab = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        sample = self.encode(b"".join(self._bytes), add_special_tokens=True)
        identity = json.dumps([vocab, sorted(self._special.items()), sample])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    # Chat

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as one prompt. Encode it with `encode_chat`, not by hand: see there.

        Raises:
            DataError: there is no template, or it refused the messages.
        """
        if self.chat_template is None:
            raise DataError("chat_template: this tokenizer has none")
        names = {"bos_token": self._text(self.bos_id) or "", "eos_token": self._text(self.eos_id) or ""}
        return render_chat(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, **names, **variables
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The conversation's token ids: markers of the template are control tokens, the same in a message are text.

        While the template runs, markers in messages are replaced by private-use characters that occur nowhere.

        Raises:
            DataError: as `apply_chat_template`.
        """
        masked, hidden = hide_markers(messages, self._special.values())
        prompt = self.apply_chat_template(masked, add_generation_prompt, **variables)
        if not hidden:
            return self.encode(prompt, parse_special=True)
        id_of = {text: id for id, text in self._special.items()}
        pattern = "|".join(map(re.escape, sorted(id_of, key=len, reverse=True)))
        ids: list[int] = []
        for part in re.split(f"({pattern})", prompt):
            if part in id_of:
                ids.append(id_of[part])
            elif part:
                ids += self.encode(part.translate(hidden))
        return ids

    def _text(self, id: int | None) -> str | None:
        return None if id is None else self._backend.id_to_token(id)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size:,} ids)"
