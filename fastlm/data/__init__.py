"""Text, tokenizers, token files, and the batches made of them."""

from fastlm.data.corpora import corpus
from fastlm.data.errors import DataError
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import ContiguousBatches, TokenFile, encode_to_file, random_blocks

__all__ = ["ContiguousBatches", "DataError", "TokenFile", "Tokenizer", "corpus", "encode_to_file", "random_blocks"]
