"""The bytes that stand behind tokens, and the strings that stand for bytes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping

import tokenizers

from fastlm.data.errors import DataError

__all__ = ["BYTE_OF", "EACH_BYTE", "byte_table", "surroundings"]

# Python's "replace" makes one U+FFFD of a character that breaks off; llama.cpp makes one of each of its bytes.
EACH_BYTE = "fastlm.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next free code point from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def byte_table(backend: tokenizers.Tokenizer, vocab: Mapping[str, int], size: int) -> tuple[list[bytes], bool]:
    """The bytes of each id as the backend's decoder defines them, and whether a text loses its first space.

    Raises:
        DataError: the decoder does not join tokens byte by byte (WordPiece, for one).
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    parts = {part["type"]: part for part in decoder.get("decoders", [decoder])}
    to_bytes: Callable[[str], bytes] = str.encode
    strip = False
    if "ByteLevel" in parts:
        to_bytes = _byte_level_bytes
    elif "ByteFallback" in parts or "Metaspace" in parts:
        to_bytes = _sentencepiece_bytes
        strip = "Strip" in parts or parts.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    elif set(parts) != {"Fuse"}:
        names = " + ".join(parts)
        raise DataError(f"tokenizer.json: decoder {names} is not supported; byte-level, sentencepiece and Fuse are")
    table = [b""] * size
    for token, id in vocab.items():
        table[id] = to_bytes(token)
    return table, strip


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:  # not made of stand-ins, so it stands for itself
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()


def surroundings(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the backend's post-processor puts before and after a text."""
    text = next((token for token in backend.get_vocab(with_added_tokens=False) if token.isalnum()), "a")
    inner = backend.encode(text, add_special_tokens=False).ids
    outer = backend.encode(text, add_special_tokens=True).ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    return [], []
