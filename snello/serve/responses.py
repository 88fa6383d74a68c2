"""OpenAI's Responses over the same path as chats: its items become messages, what is said becomes its items and events.

Nothing is stored between requests: the whole conversation comes with each one, and a field that needs a memory here
(`previous_response_id`, `conversation`) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from snello.serve.errors import RequestError
from snello.serve.fields import BOOLEAN, INTEGER, LIST, TABLE, TEXT, Kind, read_fields
from snello.serve.openai import SAMPLING
from snello.serve.options import Limits
from snello.serve.reading import Reading, read_chat
from snello.serve.sse import event
from snello.serve.voices import Row

ITEMS = Kind(
    "a string or a list of items",
    lambda value: isinstance(value, str) or bool(LIST.holds(value)),
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]},
)
CHOICE = Kind(
    "none, auto, required or a table",
    lambda value: value in ("none", "auto", "required") or isinstance(value, dict),
    {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]},
)
TOOLS = Kind(
    "a list", lambda value: isinstance(value, list), {"type": "array", "items": {"type": "object"}}
)  # of tables, as they are read one by one
FIELDS: dict[str, Kind] = {
    name: kind for name, kind in SAMPLING.items() if name not in ("max_tokens", "n", "stop")
} | {
    "chat_template_kwargs": TABLE,
    "input": ITEMS,
    "instructions": TEXT,
    "max_output_tokens": INTEGER,
    "model": TEXT,
    "parallel_tool_calls": BOOLEAN,
    "stream": BOOLEAN,
    "text": TABLE,
    "tool_choice": CHOICE,
    "tools": TOOLS,
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None, "summary": None}),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
OWN_NAMES = (  # of what the fields of a chat are here
    (re.compile(r"\bmax_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\bmessages\[\d+\](\.content(\[\d+\])?)?"), "input"),  # several items may be one message
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"^prompt$"), "input"),
)
TEXT_PARTS = ("input_text", "output_text", "text")


def read_response(body: Mapping[str, Any], limits: Limits) -> tuple[Reading, dict[str, Any]]:
    """The chat that this request is, and the fields that its answer repeats.

    Raises:
        RequestError: a field is wrong or asks for what is not done here.
    """
    given = read_fields(body, FIELDS, neutral=NEUTRAL, required=("input",))
    messages = [message for place, item in enumerate(_items(given["input"])) for message in _message(place, item)]
    if "instructions" in given:
        messages.insert(0, {"role": "system", "content": given["instructions"]})
    chat = {name: value for name, value in given.items() if name in SAMPLING or name == "chat_template_kwargs"}
    chat |= {"messages": _joined(messages), "model": given.get("model"), "stream": given.get("stream")}
    chat["max_completion_tokens"] = given.get("max_output_tokens")
    chat["tools"] = [_tool(place, tool) for place, tool in enumerate(given.get("tools", []))]
    chat["tool_choice"] = _choice(given.get("tool_choice"))
    chat["parallel_tool_calls"] = given.get("parallel_tool_calls")
    chat["response_format"] = _format(given.get("text", {}))
    with own_names():
        reading = read_chat(chat, limits)
    return reading, {name: given[name] for name in REPEATED if name in given}


@contextmanager
def own_names() -> Iterator[None]:
    """What the chat that a request is got wrong, told by the names of Responses."""
    try:
        yield
    except RequestError as error:
        raise RequestError(
            _own(error.message),
            param=error.param and _own(error.param),
            code=error.code,
            status=error.status,
            retry_after=error.retry_after,
        ) from None


def _own(words: str) -> str:
    for pattern, name in OWN_NAMES:
        words = pattern.sub(name, words)
    return words


REPEATED = (
    "instructions",
    "max_output_tokens",
    "parallel_tool_calls",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
)


def _items(given: str | list[Any]) -> list[Any]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _message(place: int, item: Any) -> list[dict[str, Any]]:
    where = f"input[{place}]"
    kind = item.get("type", "message") if isinstance(item, dict) else None
    role = item.get("role") if kind == "message" else None
    if isinstance(role, str) and role in ROLES:
        return [{"role": ROLES[role], "content": _content(where, item.get("content"))}]
    if kind == "function_call" and all(isinstance(item.get(name), str) for name in ("call_id", "name", "arguments")):
        function = {"name": item["name"], "arguments": item["arguments"]}
        return [
            {"role": "assistant", "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}
        ]
    if kind == "function_call_output" and isinstance(item.get("call_id"), str):
        return [{"role": "tool", "tool_call_id": item["call_id"], "content": _content(where, item.get("output"))}]
    message = f"{where} must be a message, a function_call or a function_call_output"
    raise RequestError(message, param=where, code="unsupported_content")


def _content(where: str, content: Any) -> Any:
    """Parts by the names that chats have for them; the chat's reader does the rest."""
    if not isinstance(content, list):
        return content
    for at, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            message = f"{where}.content[{at}] is no text, and only text is read here"
            raise RequestError(message, param=where, code="unsupported_content")
    return [{"type": "text", "text": part.get("text")} for part in content]


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls that follow the assistant's words, or each other, are one message to a template."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        before = joined[-1] if joined else {}
        if message.get("tool_calls") and before.get("role") == "assistant":
            calls = [*before.get("tool_calls", ()), *message["tool_calls"]]
            joined[-1] = {**before, "tool_calls": calls}
        else:
            joined.append(message)
    return joined


def _tool(place: int, tool: Any) -> Any:
    """A function as chats have it; anything else is refused by the chat's reader."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RequestError(
            "only tools of type function are done here", param=f"tools[{place}]", code="unsupported_tool"
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: Mapping[str, Any]) -> Any:
    if set(text) - {"format", "verbosity"} or text.get("verbosity") not in (None, "medium"):
        raise RequestError("text may have a format alone here", param="text", code="unsupported_parameter")
    form = text.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return form


# ---- what is said ---------------------------------------------------------------------------------------------------


class ResponseWriter:
    """Rows of a chat as items, and as the events that tell of them.

    Args:
        name: of the request. repeated: fields of the request that a response repeats. created: seconds since 1970.
    """

    def __init__(self, name: str, model: str, created: int, repeated: Mapping[str, Any]) -> None:
        self._name, self._items, self._sequence = name, list[dict[str, Any]](), 0
        self._open = False  # the last item is a message that may go on
        self._reason: str | None = None
        self.body: dict[str, Any] = {
            "id": f"resp_{name}", "object": "response", "created_at": created, "status": "in_progress", "error": None,
            "incomplete_details": None, "instructions": None, "max_output_tokens": None, "metadata": {}, "model": model,
            "output": [], "parallel_tool_calls": True, "previous_response_id": None, "reasoning": None, "store": False,
            "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
            "top_p": None, "truncation": "disabled", "usage": None, **repeated,
        }  # fmt: skip

    def start(self) -> bytes:
        return self._event("response.created", response=self.body) + self._event(
            "response.in_progress", response=self.body
        )

    def take(self, rows: Iterable[Row]) -> bytes:
        """The events of these rows."""
        said = b""
        for row in rows:
            delta = row["delta"]
            if delta.get("content"):
                said += self._text(delta["content"])
            for call in delta.get("tool_calls", ()):
                said += self._call(call)
            self._reason = row["finish_reason"] or self._reason
        return said

    def _text(self, text: str) -> bytes:
        said = b"" if self._open else self._open_message()
        self._items[-1]["content"][0]["text"] += text
        return said + self._about_text("response.output_text.delta", delta=text, logprobs=[])

    def _open_message(self) -> bytes:
        item = {"id": self._item_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
        said = self._about_item("response.output_item.added", {**item, "content": []}, len(self._items))
        self._items.append({**item, "content": [_part("")]})
        self._open = True
        return said + self._about_text("response.content_part.added", part=_part(""))

    def _close_message(self) -> bytes:
        if not self._open:
            return b""
        self._open, item = False, self._items[-1]
        item["status"], text = "completed", item["content"][0]["text"]
        said = self._about_text("response.output_text.done", text=text, logprobs=[])
        said += self._about_text("response.content_part.done", part=_part(text))
        return said + self._about_item("response.output_item.done", item, len(self._items) - 1)

    def _call(self, call: Mapping[str, Any]) -> bytes:
        said, function, index = self._close_message(), call["function"], len(self._items)
        item = {
            "id": self._item_id("fc"), "type": "function_call", "status": "completed", "call_id": call["id"],
            "name": function["name"], "arguments": function["arguments"],
        }  # fmt: skip
        self._items.append(item)
        begun, where = (
            {**item, "status": "in_progress", "arguments": ""},
            {"item_id": item["id"], "output_index": index},
        )
        said += self._about_item("response.output_item.added", begun, index)
        said += self._event("response.function_call_arguments.delta", delta=item["arguments"], **where)
        said += self._event(
            "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"], **where
        )
        return said + self._about_item("response.output_item.done", item, index)

    def end(self, usage: Mapping[str, Any]) -> bytes:
        """The last events; `body` is the whole answer then."""
        said, whole = self._close_message(), self._reason != "length"
        self.body |= {"status": "completed" if whole else "incomplete", "output": self._items, "usage": _usage(usage)}
        if not whole:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        return said + self._event(f"response.{self.body['status']}", response=self.body)

    def failed(self, error: RequestError) -> bytes:
        self.body |= {"status": "failed", "output": self._items}
        self.body["error"] = {"code": error.code or error.kind, "message": error.message}
        return self._event("response.failed", response=self.body)

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self._name}_{len(self._items)}"

    def _about_text(self, kind: str, **more: Any) -> bytes:
        place = len(self._items) - 1
        return self._event(kind, item_id=self._items[-1]["id"], output_index=place, content_index=0, **more)

    def _about_item(self, kind: str, item: Mapping[str, Any], index: int) -> bytes:
        return self._event(kind, output_index=index, item=item)

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return event({"type": kind, "sequence_number": number, **more}, name=kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},  # newer clients ask for it
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
