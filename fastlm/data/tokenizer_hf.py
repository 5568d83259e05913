"""Tokenizers in Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from fastlm.data.errors import DataError

__all__ = ["read_folder", "surround"]


def read_folder(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer` for a folder. Raises DataError as `Tokenizer.from_hf`."""
    config = _json(folder / "tokenizer_config.json")
    names = {**_json(folder / "special_tokens_map.json"), **config}
    backend = _backend(folder, config)
    special = {key: _content(names.get(f"{key}_token")) for key in ("bos", "eos", "unk")}
    if not any(special.values()) and backend.token_to_id("<|endoftext|>") is not None:
        special = dict.fromkeys(special, "<|endoftext|>") | {"unk": None}  # GPT-2's files name none
    # Adding what is there already changes no id; it only makes sure that the library knows it is special.
    there = [text for text in special.values() if text and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in there])
    ids = {key: backend.token_to_id(text) if text else None for key, text in special.items()}
    # With tokenizer.json, its post-processor alone says what is added, as in transformers 5.
    if backend.post_processor is None and config.get("add_bos_token") and not (folder / "tokenizer.json").is_file():
        surround(backend, ids["bos"], None)
    own = config.get("fastlm", {})
    stop = own.get("stop_ids", _json(folder / "generation_config.json").get("eos_token_id"))
    return {
        "backend": backend,
        "kind": own.get("kind", "hf"),
        "bos_id": ids["bos"],
        "eos_id": ids["eos"],
        "unk_id": ids["unk"] if _marks_unknown(backend, special["unk"]) else None,
        "stop_ids": [stop] if isinstance(stop, int) else stop or [],
        "chat_template": _chat_template(folder, config),
    }


def surround(backend: tokenizers.Tokenizer, bos: int | None, eos: int | None) -> None:
    """Makes `backend` put these tokens around a text when special tokens are asked for."""
    before = [] if bos is None else [(backend.id_to_token(bos), bos)]
    after = [] if eos is None else [(backend.id_to_token(eos), eos)]
    single = [*(text for text, _ in before), "$A", *(text for text, _ in after)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=before + after)


def _backend(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if not (vocab.is_file() and merges.is_file()):
            hint = "; tokenizer.model alone is not supported" if (folder / "tokenizer.model").is_file() else ""
            raise DataError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt is there{hint}")
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{whole if whole.is_file() else vocab}: not a tokenizer: {error}") from error
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    for id, token in sorted((int(id), token) for id, token in config.get("added_tokens_decoder", {}).items()):
        flags = {
            key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != id:
            raise DataError(
                f"{folder / 'tokenizer_config.json'}: added token {token['content']!r} can't have the id {id}"
            )
    return backend


def _marks_unknown(backend: tokenizers.Tokenizer, text: str | None) -> bool:
    """Whether `text` is what the model emits for what it doesn't know; GPT-2 calls its end of text that, too."""
    return text is not None and getattr(backend.model, "unk_token", None) == text


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}, not text")
    return template


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value
