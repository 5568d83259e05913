"""Chat templates: Jinja as in Hugging Face tokenizers, in a sandbox.

A template comes with a checkpoint, so it is someone else's program: it runs in Jinja's immutable sandbox, which keeps
it from Python's internals and from changing what it is given.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastlm.data.errors import DataError

__all__ = ["hide_markers", "render_chat"]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is the text alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The prompt that `template` makes of a conversation.

    Args:
        template: Jinja source.
        messages: dicts with "role" and "content" (and whatever else the template knows).
        add_generation_prompt: end with the beginning of the assistant's turn.
        variables: `bos_token`, `eos_token`, `tools`, ... as the template expects.

    Raises:
        DataError: a message without a role, the template is not valid Jinja, left its sandbox, or refused the messages.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{index}]: {message!r}, expected a dict with a string 'role' and 'content'")
    try:
        return _compile(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
        )
    except TemplateSyntaxError as error:
        raise DataError(f"chat template, line {error.lineno}: {error.message}") from error
    except Exception as error:  # whatever someone else's program runs into
        raise DataError(f"chat template: {error}") from error


def hide_markers(
    messages: Sequence[Mapping[str, Any]], markers: Iterable[str]
) -> tuple[Sequence[Mapping[str, Any]], dict[int, str]]:
    """Replaces each marker that occurs in a message by a private-use character that occurs in none.

    Returns:
        The messages, and a table for `str.translate` that undoes it: empty where no marker occurs.
    """
    text = "\0".join(_strings(messages))
    present = sorted((marker for marker in markers if marker in text), key=len, reverse=True)
    if not present:
        return messages, {}
    free = (code for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    hidden = dict(zip(present, free, strict=False))

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            for marker, code in hidden.items():
                value = value.replace(marker, chr(code))
            return value
        if isinstance(value, Mapping):
            return {hide(key): hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, list | tuple) else value

    return hide(list(messages)), {code: marker for marker, code in hidden.items()}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
