"""Tokenizers in GGUF files, as llama.cpp reads them.

A GGUF file holds the vocabulary and the merges but only the *name* of the rule that splits text into words before
merging (`tokenizer.ggml.pre`), so the rules themselves are here: the patterns of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fastlm.data.errors import DataError
from fastlm.data.tokenizer import GPT2_PATTERN
from fastlm.data.tokenizer_hf import surround

__all__ = ["read_metadata"]

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _CASED.replace("{0}", _CONTRACTION + "?") + r"|\p{N}{1,3}" + _CASED_REST
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _CASED_REST
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Each pattern splits what the ones before it left.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_PATTERN,),
    "smollm": (r"\p{N}", GPT2_PATTERN),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "gpt-4o": (_GPT4O,),
    "tekken": (_TEKKEN,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]"),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_SAME = {
    "gpt-2": "phi-2 mpt olmo jais gigachat mellum exaone4 trillion granite-docling a.x-4.0",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    "qwen2": "stablelm2 deepseek-r1-qwen hunyuan megrez grok-2 kormo",
    "gpt-4o": "llama4",
    "deepseek-v3": "hunyuan-dense",
}
_RULE = {name: name for name in _PATTERNS} | {alias: name for name, all in _SAME.items() for alias in all.split()}

# A word that is in the vocabulary as a whole is one token here, whatever the merges say; and bos is the default.
_WHOLE_WORDS = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Tokenizer` for a file's metadata. Raises DataError as `Tokenizer.from_gguf`."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model = get("model")
    tokens = [str(token) for token in _required(metadata, "tokenizer.ggml.tokens")]
    types = [int(type) for type in get("token_type", [_NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise DataError(f"tokenizer.ggml.token_type: {len(types)} entries for {len(tokens)} tokens")
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise DataError(f"tokenizer.ggml.tokens: {twice!r} occurs twice")
    bos_default = False
    if model == "gpt2":
        pre = get("pre", "default")
        backend = _byte_level(vocab, _required(metadata, "tokenizer.ggml.merges"), pre)
        bos_default = pre in _WHOLE_WORDS
    elif model == "llama":
        scores = [float(score) for score in _required(metadata, "tokenizer.ggml.scores")]
        if len(scores) != len(tokens):
            raise DataError(f"tokenizer.ggml.scores: {len(scores)} entries for {len(tokens)} tokens")
        backend = _sentencepiece(vocab, types, scores, bool(get("add_space_prefix", True)))
        bos_default = True
    else:
        raise DataError(
            f"tokenizer.ggml.model: {model!r} is not supported; 'gpt2' (BPE) and 'llama' (sentencepiece) are"
        )

    for id, type in enumerate(types):
        token = tokens[id]
        if type in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=type != _USER_DEFINED, normalized=False)])
            if backend.token_to_id(token) != id:
                raise DataError(f"tokenizer.ggml.tokens: {token!r} can't have the id {id}")
    ids = {key: None if get(f"{key}_token_id") is None else int(get(f"{key}_token_id")) for key in _ID_KEYS}
    if model == "llama":  # what sentencepiece models have where the file does not say
        ids = {**ids, **{key: usual for key, usual in _SENTENCEPIECE_IDS.items() if ids[key] is None}}
    for key, given in ids.items():
        if given is not None and not 0 <= given < len(tokens):
            raise DataError(f"tokenizer.ggml.{key}_token_id: {given}, expected 0 to {len(tokens) - 1}")
    surround(
        backend,
        ids["bos"] if get("add_bos_token", bos_default) else None,
        ids["eos"] if get("add_eos_token", False) else None,
    )
    template = metadata.get("tokenizer.chat_template")
    return {
        "backend": backend,
        "kind": "gguf",
        "bos_id": ids["bos"],
        "eos_id": ids["eos"],
        # Byte-level models know everything; their "unknown" is the end of a text by another name.
        "unk_id": ids["unknown"] if model == "llama" else None,
        "stop_ids": [end for end in (ids["eot"], ids["eom"]) if end is not None],
        "chat_template": None if template is None else str(template),
    }


_ID_KEYS = ("bos", "eos", "unknown", "eot", "eom")
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    value = metadata.get(key)
    if value is None or len(value) == 0:
        raise DataError(f"{key}: not in the file, so it holds no usable tokenizer")
    return value


def _byte_level(vocab: dict[str, int], merges: Any, pre: str) -> tokenizers.Tokenizer:
    if pre not in _RULE:
        known = ", ".join(sorted(_RULE))
        raise DataError(f"tokenizer.ggml.pre: {pre!r} is not a known way to split words (known: {known})")
    pairs = []
    for merge in merges:
        left, _, right = str(merge).partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise DataError(f"tokenizer.ggml.merges: {merge!r} joins or makes a token that is not in the vocabulary")
        pairs.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[_RULE[pre]]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    vocab: dict[str, int], types: list[int], scores: list[float], space_prefix: bool
) -> tokenizers.Tokenizer:
    """Sentencepiece's BPE joins the neighbours that make the token of the highest score: merges in order of score.

    Of two tokens with the same score sentencepiece makes the one further left first, and this, like Hugging Face's
    conversion, always the same one; the models' vocabularies rank their tokens without ties.
    """
    plain = {token: id for token, id in vocab.items() if types[id] in (_NORMAL, _USER_DEFINED)}
    merges = []
    for token, id in plain.items():
        for cut in range(1, len(token)):
            left, right = plain.get(token[:cut]), plain.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[id], left, right, token[:cut], token[cut:]))
    merges.sort()
    unknown = next((token for token, id in vocab.items() if types[id] == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[m[3:] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend("\u2581")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
