"""Text from models: the KV-cache generation loop, sampling options, streaming, and `fastlm.load`."""

from fastlm.generation.decoder import Decoder
from fastlm.generation.engine import Engine, Token
from fastlm.generation.language_model import Completion, LanguageModel, load
from fastlm.generation.params import SamplingParams
from fastlm.generation.text import TextAssembler

__all__ = ["Completion", "Decoder", "Engine", "LanguageModel", "SamplingParams", "TextAssembler", "Token", "load"]
