"""Text, tokenizers, token files, and the batches made of them."""

from fastlm.data.cleaning import CLEANING_STEPS, clean
from fastlm.data.corpora import corpus
from fastlm.data.errors import DataError
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import ContiguousBatches, TokenFile, encode_to_file, random_blocks

__all__ = [
    "CLEANING_STEPS",
    "ContiguousBatches",
    "DataError",
    "TokenFile",
    "Tokenizer",
    "clean",
    "corpus",
    "encode_to_file",
    "random_blocks",
]
