"""The exception for text, tokenizers and token files that can't be used."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """Text, a tokenizer or a token file could not be read or written; the message names the culprit."""
