"""Chat templates: messages to one prompt string, rendered exactly as Transformers renders them.

A template is untrusted code from a checkpoint, so it runs in Jinja's immutable sandbox and sees plain data only.
What Transformers gives to templates (`raise_exception`, `strftime_now`, `tojson`, loop controls, the `generation`
tag) is given here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from snello.errors import SnelloError

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message's reasoning is passed

_SCALARS: Mapping[type, Any] = {str: str.__str__, int: int.__int__, float: float.__float__}


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """The prompt for these messages.

    `variables` reach the template (`tools`, `documents`, `enable_thinking`, ...).

    Raises:
        SnelloError: the template is broken, or refuses these messages (its own words are given).
    """
    compiled = _compile(template)
    chat = [_with_reasoning(_message(message)) for message in messages]
    context = {"tools": None, "documents": None, **(special_tokens or {}), **_plain(variables)}
    try:
        return compiled.render(messages=chat, add_generation_prompt=add_generation_prompt, **context)
    except TemplateError as error:
        raise SnelloError(f"the chat template refuses these messages: {error}", "check roles and their order") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        message = f"the chat template fails on these messages: {error}"
        raise SnelloError(message, "check that each message has a role and a content that the template reads") from None


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateError as error:
        message = f"the chat template is not valid Jinja: {error}"
        raise SnelloError(message, "copy the tokenizer's files again, or give a prompt without a chat") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts are not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise SnelloError(
            f"a chat message is {type(message).__name__}, not a table", 'write {"role": ..., "content": ...}'
        )
    # as in Transformers: of what is null templates expect that it is not there (many would write "None")
    return {str(key): _plain(value) for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Plain JSON types, rebuilt: no object whose methods a template could call."""
    if value is None or type(value) is bool:
        return value
    for kind, plain in _SCALARS.items():
        if isinstance(value, kind):  # the member of an enumeration is the text or number that it stands for
            return plain(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
