"""Functions that a model may call: what is offered to it, what it must say, and calls read out of what it said.

How a call is written is the model's own affair, and its chat template shows it: Hermes and Qwen write
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, Llama 3 the bare JSON with `parameters`, Mistral
`[TOOL_CALLS]` and a list. A parser takes the answer piece by piece, gives on what is text as soon as it cannot become
a call any more, and calls when they are whole; streams and whole answers are made by the same parser. What only looks
like a call stays text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from snello.engine.grammar import SPACING
from snello.models.tokenizer import Tokenizer
from snello.serve.errors import RequestError
from snello.serve.fields import BOOLEAN, TABLE, TEXT

Format = Literal["hermes", "llama3", "mistral"]
MARKS: tuple[tuple[str, Format], ...] = (  # what a template holds -> how calls are written
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3"),
    ('"parameters":', "llama3"),
)


@dataclass(frozen=True)
class Call:
    """A call that was read. `arguments`: JSON text."""

    name: str
    arguments: str


Said = str | Call


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What is offered. `choice`: "auto", "required", or the name of one function that must be called."""

    functions: Sequence[Mapping[str, Any]]  # OpenAI's `function` tables
    choice: str = "auto"
    parallel: bool = True

    @property
    def listed(self) -> list[dict[str, Any]]:
        """As chat templates expect them."""
        return [{"type": "function", "function": dict(function)} for function in self.functions]

    @property
    def forced(self) -> bool:
        return self.choice != "auto"


def format_of(tokenizer: Tokenizer) -> Format | None:
    """How calls are written by the model of this tokenizer; None: its template does not offer functions."""
    template = tokenizer.chat_templates.get("tool_use") or tokenizer.chat_templates.get("default", "")
    if "tools" not in template:
        return None
    return next((form for mark, form in MARKS if mark in template), None)


def schema_of(tools: Tools, arguments: str = "arguments") -> tuple[str, dict[str, Any]]:
    """The names of the functions that may be called, as words, and what one call is as a JSON schema.

    Each function's own schema gets a name (`$id`), so that references in it (`#/$defs/...`) stay inside it.

    Args:
        arguments: how the model names them.
    """
    chosen = [f for f in tools.functions if tools.choice in ("required", f["name"])]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f["name"]},
                arguments: {"$id": f"urn:function:{place}", **(f.get("parameters") or {"type": "object"})},
            },
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for place, f in enumerate(chosen)
    ]
    return ", ".join(f["name"] for f in chosen), {"anyOf": calls} if len(calls) > 1 else calls[0]


def grammar_of(tools: Tools, form: Format, tokenizer: Tokenizer) -> str:
    """A Lark grammar of answers that are calls of the chosen functions and nothing else."""
    _, schema = schema_of(tools, "parameters" if form == "llama3" else "arguments")
    several = tools.choice == "required" and tools.parallel
    text = json.dumps({**schema, **SPACING})
    if form == "llama3":
        return f"start: call\ncall: %json {text}\n"
    if form == "mistral":
        mark = _tag("[TOOL_CALLS]", tokenizer) if tokenizer.token_id("[TOOL_CALLS]") is not None else ""
        more = '("," " "? call)*' if several else ""
        return f'start: {mark} "[" call {more} "]"\ncall: %json {text}\n'
    more = '("\\n" one)*' if several else ""
    begin, end = _tag(Tagged.OPEN, tokenizer), _tag(Tagged.CLOSE, tokenizer)
    return f'start: one {more}\none: {begin} "\\n" call "\\n" {end}\ncall: %json {text}\n'


def _tag(text: str, tokenizer: Tokenizer) -> str:
    """A tag in Lark: the token that it is, since a grammar of characters would spell it out; else its characters."""
    token = tokenizer.token_id(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


# ---- reading calls --------------------------------------------------------------------------------------------------


class Parser(Protocol):
    """Takes an answer piece by piece."""

    def feed(self, text: str, token: int | None) -> list[Said]: ...
    def flush(self) -> list[Said]: ...


def parser_for(form: Format, tokenizer: Tokenizer, tools: Tools) -> Parser:
    names = {str(function["name"]) for function in tools.functions}
    if form == "hermes":
        return Tagged(names, tokenizer)
    if form == "mistral":
        return Whole(names, ("[TOOL_CALLS]",), tokenizer.token_id("[TOOL_CALLS]"), bare=tools.forced, start="[")
    return Whole(names, ("<|python_tag|>",), tokenizer.token_id("<|python_tag|>"), bare=True, start="{")


class Tagged:
    """Calls between `<tool_call>` and `</tool_call>`, text around them.

    Args:
        names: of the functions that may be called. tokenizer: a tag may be a token of it, and has no text if that is
            a special one.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: set[str], tokenizer: Tokenizer) -> None:
        self._names = names
        self._marks = {tokenizer.token_id(tag): tag for tag in (self.OPEN, self.CLOSE)}
        self._held, self._inside = "", False
        self._said = False  # a call

    def feed(self, text: str, token: int | None) -> list[Said]:
        tag = None if token is None else self._marks.get(token)
        if tag is not None and tag not in text:
            text += tag
        self._held += text
        said: list[Said] = []
        while self._advance(said):
            pass
        return said

    def _advance(self, said: list[Said]) -> bool:
        """One boundary further; False: what is held says no more for now."""
        if self._inside:
            inner, tag, rest = self._held.partition(self.CLOSE)
            if not tag:
                return False
            self._close(said, inner, inner + self.CLOSE)
            self._held = rest
            return True
        outer, tag, rest = self._held.partition(self.OPEN)
        if tag:
            self._text(said, outer)
            self._inside, self._held = True, rest
            return True
        keep = _beginning(self._held, self.OPEN)
        cut = len(self._held) - keep
        if self._said and not self._held[:cut].strip():
            return False  # line ends between calls, or after the last one
        self._text(said, self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _text(self, said: list[Said], text: str) -> None:
        if text and (text.strip() or not self._said):
            said.append(text)

    def _close(self, said: list[Said], inner: str, raw: str) -> None:
        calls = _calls(inner, self._names)
        self._inside = False
        if calls is None:
            said.append(self.OPEN + raw)
        else:
            self._said = True
            said += calls

    def flush(self) -> list[Said]:
        """The end: a call that was not closed counts if it is whole."""
        said: list[Said] = []
        if self._inside:
            self._close(said, self._held, self._held)
        else:
            self._text(said, self._held)
        self._held = ""
        return said


class Whole:
    """Calls that are all that follows a mark, or (`bare`) the whole answer where it begins like one."""

    def __init__(self, names: set[str], marks: tuple[str, ...], mark: int | None, *, bare: bool, start: str) -> None:
        self._names, self._marks, self._mark, self._bare, self._start = names, marks, mark, bare, start
        self._held, self._calling, self._undecided = "", False, bare

    def feed(self, text: str, token: int | None) -> list[Said]:
        said: list[Said] = []
        if token is not None and token == self._mark and not any(mark in text for mark in self._marks):
            text += self._marks[0]
        self._held += text
        if self._calling:
            return said
        for mark in self._marks:
            before, found, after = self._held.partition(mark)
            if found:
                said += [before] if before.strip() else []
                self._calling, self._held = True, after
                return said
        if self._undecided and self._held.strip():
            self._undecided = False
            if self._held.lstrip().startswith(self._start):
                self._calling = True
                return said
        if not self._undecided:
            cut = len(self._held) - max(_beginning(self._held, mark) for mark in self._marks)
            said += [self._held[:cut]] if cut else []
            self._held = self._held[cut:]
        return said

    def flush(self) -> list[Said]:
        text, self._held = self._held, ""
        if self._calling:
            calls = _calls(text, self._names)
            if calls is not None:
                return list(calls)
        return [text] if text else []


def _beginning(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _calls(text: str, names: set[str]) -> list[Call] | None:
    """The calls that this text is, and is nothing else; None where it is not.

    One table, a list of them, several with `;`, a comma or line ends between them, or Mistral's NAME{...}.
    """
    decoder, calls, rest = json.JSONDecoder(), list[Call](), text.strip()
    while rest:
        name = next((name for name in sorted(names, key=len, reverse=True) if rest.startswith(name)), None)
        rest = rest[len(name) :].removeprefix("[ARGS]").lstrip() if name else rest
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        tables = [{"name": name, "arguments": value}] if name else value if isinstance(value, list) else [value]
        read = [_call(table, names) for table in tables]
        if None in read:
            return None
        calls += [call for call in read if call is not None]
        rest = rest[end:].lstrip(" \n\t;,").removeprefix("[TOOL_CALLS]")
    return calls or None


def _call(table: Any, names: set[str]) -> Call | None:
    if not isinstance(table, dict) or table.get("name") not in names:
        return None
    arguments = table.get("arguments", table.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON, as some write it
        return Call(table["name"], arguments)
    return Call(table["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


# ---- the request's fields -------------------------------------------------------------------------------------------


FUNCTION_FIELDS = {"name": TEXT, "description": TEXT, "parameters": TABLE, "strict": BOOLEAN}


def read_tools(tools: Any, choice: Any, parallel: Any, most: int) -> Tools | None:
    """The `tools` and `tool_choice` of a chat; None where no call may be made.

    Raises:
        RequestError: they are not what OpenAI's reference says, or ask for what is not done here.
    """
    if tools is not None and (not isinstance(tools, list) or len(tools) > most):
        raise RequestError(f"tools must be a list of at most {most}", param="tools", code="invalid_type")
    if not isinstance(parallel, bool | None):
        message = "parallel_tool_calls must be true or false"
        raise RequestError(message, param="parallel_tool_calls", code="invalid_type")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice", code="invalid_value")
        return None
    functions = [_function(f"tools[{place}]", tool) for place, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", param="tools", code="invalid_value")
    chosen = _choice(choice, names)
    if chosen == "none":
        return None
    if parallel is False and chosen == "auto":
        message = (
            "parallel_tool_calls: false needs a tool_choice that forces a call: nothing else can hold a model to it"
        )
        raise RequestError(message, param="parallel_tool_calls", code="unsupported_parameter")
    if chosen == "auto" and any(tool["function"].get("strict") for tool in tools):
        message = "strict holds where tool_choice forces a call (required, or a function); leave it out for auto"
        raise RequestError(message, param="tools", code="unsupported_parameter")
    return Tools(functions=functions, choice=chosen, parallel=parallel is not False)


def _function(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function" or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must be a function with a name", param=where, code="unsupported_tool")
    for name in sorted({*tool} - {"type", "function"} | {*function} - FUNCTION_FIELDS.keys()):
        raise RequestError(f"there is no field {name!r} in {where}", param=where, code="unknown_parameter")
    given = {name: value for name, value in function.items() if value is not None}
    for name, value in given.items():
        if not FUNCTION_FIELDS[name].holds(value):
            message = f"{where}.function.{name} must be {FUNCTION_FIELDS[name].name}"
            raise RequestError(message, param=where, code="invalid_type")
    return {name: value for name, value in given.items() if name != "strict"}


def _choice(choice: Any, names: Sequence[str]) -> str:
    if choice in (None, "auto", "none", "required"):
        return choice or "auto"
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise RequestError("tool_choice names no function among the tools", param="tool_choice", code="invalid_value")
    return str(name)
