"""What only a server answers, beside what `openai.py` reads: streams, functions, grammars, echoed log-probabilities.

A file of requests refuses these fields by name; here they are taken out of the body first, and the rest is read by the
same readers. Limits of size are held here too, before anything is tokenized.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from snello.engine.grammar import Kind
from snello.serve import openai
from snello.serve.errors import RequestError
from snello.serve.fields import check_unicode, finite
from snello.serve.openai import ChatRequest, CompletionRequest, EmbeddingRequest
from snello.serve.options import Limits
from snello.serve.tools import Tools, read_tools

STREAM_OPTIONS = {"include_usage", "include_obfuscation"}  # the second: padding against eavesdroppers; there is none
STRUCTURED: dict[Kind, str] = {
    "json": "a table that is a JSON schema",
    "regex": "a string: a regular expression",
    "choice": "a list of strings, none of them empty",
    "grammar": "a string: a grammar in Lark's form",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an answer must be: a kind of grammar and its source. `param`: the field that says so."""

    kind: Kind
    value: Any
    param: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A request as the server takes it. `silent`: its prompt alone is asked for, echoed, and no token of an answer."""

    request: ChatRequest | CompletionRequest
    tools: Tools | None = None
    rules: Rules | None = None
    include_usage: bool = False
    silent: bool = False


def parse_body(raw: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON table of a body.

    Raises:
        RequestError: it is none, or nested too deeply.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_float=finite, parse_constant=_no_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON table", code="invalid_json")
    if _depth(value, limits.nesting) > limits.nesting:
        raise RequestError("the body is nested too deeply", code="invalid_json")
    check_unicode(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any, most: int) -> int:
    """Levels of tables and lists, counted to one more than `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        level, depth = [item for item in inner if isinstance(item, dict | list)], depth + 1
    return depth


def read_chat(body: Mapping[str, Any], limits: Limits) -> Reading:
    """A chat, with functions and a form for the answer."""
    rest = dict(body)
    tools = read_tools(
        rest.pop("tools", None), rest.pop("tool_choice", None), rest.pop("parallel_tool_calls", None), limits.tools
    )
    rules, other = (
        _response_format(rest.pop("response_format", None)),
        _structured(rest.pop("structured_outputs", None)),
    )
    if rules is not None and other is not None:
        message = "response_format and structured_outputs both say what an answer must be; leave one out"
        raise RequestError(message, param="structured_outputs", code="invalid_value")
    rules = rules or other
    usage = _stream_options(rest)
    request = openai.read_request(openai.CHAT, rest)
    assert isinstance(request, ChatRequest)
    if tools is not None and rules is not None:
        raise RequestError(
            "tools with a response_format are not done here", param="response_format", code="unsupported_parameter"
        )
    if tools is not None and tools.forced and request.sampling.get("logprobs") is not None:
        raise RequestError("logprobs of calls are not done here", param="logprobs", code="unsupported_parameter")
    return _within(Reading(request=request, tools=tools, rules=rules, include_usage=usage), limits)


def read_completion(body: Mapping[str, Any], limits: Limits) -> Reading:
    """A completion; here the prompt may be echoed with its own log-probabilities, and alone: with 0 tokens after it."""
    rest = dict(body)
    rules, usage = _structured(rest.pop("structured_outputs", None)), _stream_options(rest)
    both = rest.get("echo") is True and rest.get("logprobs") is not None
    silent = rest.get("echo") is True and rest.get("max_tokens") == 0 and rest["max_tokens"] is not False
    if silent:
        del rest["max_tokens"]
    if both:
        del rest["echo"]
    request = openai.read_request(openai.COMPLETIONS, rest)
    assert isinstance(request, CompletionRequest)
    if len(request.prompts) > limits.prompts:
        raise _over("prompt", f"{len(request.prompts)} prompts", limits.prompts)
    request = dataclasses.replace(request, echo=True) if both else request
    return _within(Reading(request=request, rules=rules, include_usage=usage, silent=silent), limits)


def read_embedding(body: Mapping[str, Any], limits: Limits) -> EmbeddingRequest:
    request = openai.read_request(openai.EMBEDDINGS, body)
    assert isinstance(request, EmbeddingRequest)
    if len(request.prompts) > limits.inputs:
        raise _over("input", f"{len(request.prompts)} inputs", limits.inputs)
    return request


# ---- fields ---------------------------------------------------------------------------------------------------------


def _stream_options(rest: dict[str, Any]) -> bool:
    """Whether the stream ends with the usage."""
    options = rest.pop("stream_options", None)
    if options is None:
        return False
    if not isinstance(options, dict) or not all(isinstance(value, bool | None) for value in options.values()):
        raise RequestError(
            "stream_options must be a table of true or false", param="stream_options", code="invalid_type"
        )
    for name in set(options) - STREAM_OPTIONS:
        raise RequestError(f"there is no field stream_options.{name}", param="stream_options", code="unknown_parameter")
    if rest.get("stream") is not True:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if options.get("include_obfuscation"):
        raise RequestError("include_obfuscation is not done here", param="stream_options", code="unsupported_parameter")
    return bool(options.get("include_usage"))


def _response_format(form: Any) -> Rules | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or form == {"type": "text"}:
        return None
    if form == {"type": "json_object"}:
        return Rules(kind="json", value={"type": "object"}, param="response_format")
    described = form.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, dict) or set(form) - {"type", "json_schema"}:
        message = "response_format must be text, json_object, or json_schema with its json_schema"
        raise RequestError(message, param="response_format", code="invalid_value")
    return schema_rules(described, "response_format")


def schema_rules(described: Mapping[str, Any], param: str) -> Rules:
    """The schema in a table of name, description, strict and schema: it is held to, strict or not."""
    schema = described.get("schema")
    if set(described) - {"name", "description", "strict", "schema", "type"} or schema is None:
        raise RequestError(f"{param} needs a table with a name and a schema", param=param, code="invalid_value")
    if not isinstance(schema, dict):
        raise RequestError(f"the schema of {param} must be {STRUCTURED['json']}", param=param, code="invalid_type")
    return Rules(kind="json", value=schema, param=param)


def _structured(given: Any) -> Rules | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar."""
    if given is None:
        return None
    param = "structured_outputs"
    said = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    kind = next((kind for kind in STRUCTURED if set(said) == {kind}), None)
    if kind is None:
        raise RequestError(f"{param} must have one of {', '.join(STRUCTURED)}", param=param, code="invalid_value")
    value = said[kind]
    texts = isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
    if not {"json": isinstance(value, dict), "choice": texts}.get(kind, isinstance(value, str)):
        raise RequestError(f"{param}.{kind} must be {STRUCTURED[kind]}", param=param, code="invalid_type")
    return Rules(kind=kind, value=value, param=param)


def _within(reading: Reading, limits: Limits) -> Reading:
    """Raises RequestError where a setting is over its limit."""
    sampling = reading.request.sampling
    stop = sampling.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else stop
    counts = (
        ("n", sampling.get("n", 1), limits.n),
        ("stop", len(stops), limits.stops),
        ("stop", max(map(len, stops), default=0), limits.stop_characters),
        ("logit_bias", len(sampling.get("logit_bias", ())), limits.biases),
    )
    for name, value, most in counts:
        if value > most:
            raise _over(name, str(value), most)
    if reading.rules is not None:
        size = len(json.dumps(reading.rules.value))
        if size > limits.schema_bytes:
            raise _over(reading.rules.param, f"a grammar of {size:,} bytes", limits.schema_bytes)
    if reading.tools is not None:
        size = len(json.dumps(reading.tools.listed))
        if size > limits.schema_bytes:
            raise _over("tools", f"{size:,} bytes", limits.schema_bytes)
    if isinstance(reading.request, CompletionRequest):
        choices = len(reading.request.prompts) * sampling.get("n", 1)
        if choices > limits.choices:
            raise _over("n", f"{choices} answers to all prompts", limits.choices)
    return reading


def _over(param: str, what: str, most: int) -> RequestError:
    return RequestError(f"{param}: {what}, and at most {most:,} are allowed here", param=param, code="limit_exceeded")
