"""The server's protocol as an OpenAPI document, for programs that make clients, and for those that try to break it.

Bodies of requests come from the very tables that read them (`fields.py`), so that the document cannot promise what the
reader refuses by its type, nor keep silent about a field that is taken. What only a value can tell (a prompt too long,
two settings that exclude each other) is a 400, which every route has. Bodies of answers are written here, and held to
what is really said by the tests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from snello.serve import openai, responses, tools
from snello.serve.fields import BIASES, INTEGER, WITHOUT_EFFECT, Kind
from snello.serve.options import Limits
from snello.serve.served import Models

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}


def maybe(schema: Mapping[str, Any]) -> Schema:
    """A field that is null is one that was left out."""
    return {"anyOf": [dict(schema), NULL]}


def rows(schema: Mapping[str, Any]) -> Schema:
    return {"type": "array", "items": dict(schema)}


def table(properties: Mapping[str, Mapping[str, Any]], *, but: Collection[str] = (), more: Any = None) -> Schema:
    """All of them are there, `but` for some. `more`: of other names; None: there may be any."""
    required = [name for name in properties if name not in but]
    found: Schema = {"type": "object", "properties": dict(properties), "required": required}
    return found if more is None else {**found, "additionalProperties": more}


# ---- requests -------------------------------------------------------------------------------------------------------

TOOL = table(
    {
        "type": {"const": "function"},
        "function": table(
            {
                name: kind.schema if name == "name" else maybe(kind.schema)
                for name, kind in tools.FUNCTION_FIELDS.items()
            },
            but=("description", "parameters", "strict"),
            more=False,
        ),
    },
    more=False,
)
DESCRIBED = ("name", "description", "strict", "type")  # of a schema
RESPONSE_FORMAT = {
    "anyOf": [
        table({"type": {"enum": ["text", "json_object"]}}, more=False),
        table(
            {
                "type": {"const": "json_schema"},
                "json_schema": table(
                    {**{name: {} for name in DESCRIBED}, "schema": {"type": "object"}},
                    but=DESCRIBED,
                    more=False,
                ),
            },
            more=False,
        ),
    ]
}
KINDS: dict[str, Schema] = {
    "json": {"type": "object"},
    "regex": STRING,
    "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "grammar": STRING,
}
STRUCTURED = {
    "anyOf": [
        table({**dict.fromkeys(KINDS, NULL), name: schema}, but=tuple(set(KINDS) - {name}), more=False)
        for name, schema in KINDS.items()
    ]
}
STREAM_OPTIONS = table(
    {"include_usage": maybe(TRUTH), "include_obfuscation": {"enum": [False, None]}},
    but=("include_usage", "include_obfuscation"),
    more=False,
)
SAID_CALL = table({"function": table({"name": STRING, "arguments": {"type": ["string", "object"]}})})
MESSAGE = table(
    {
        "role": STRING,
        "content": maybe({"anyOf": [STRING, rows(table({"type": {"const": "text"}, "text": STRING}))]}),
        "tool_calls": maybe(rows(SAID_CALL)),
        **{name: {} for name in sorted(openai.MESSAGE_FIELDS - {"role", "content", "tool_calls"})},
    },
    but=openai.MESSAGE_FIELDS - {"role"},
    more=NULL,
)
MESSAGES = {"type": "array", "items": MESSAGE, "minItems": 1}
SERVED_CHAT = {  # what `reading.py` takes before the tables are asked
    "messages": MESSAGES,
    "tool_choice": maybe(responses.CHOICE.schema),
    "parallel_tool_calls": maybe(TRUTH),
    "response_format": maybe(RESPONSE_FORMAT),
}
RANGES: dict[str, Schema] = {  # of settings, as `SamplingParams` has them
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "top_logprobs": {"minimum": 0, "maximum": openai.MOST_LOGPROBS},
}

NO_TOKENS_ONLY_ECHOED: Schema = {
    "if": {"properties": {"max_tokens": {"const": 0}}, "required": ["max_tokens"]},
    "then": {"properties": {"echo": {"const": True}}, "required": ["echo"]},
}


def body(
    fields: Mapping[str, Kind],
    neutral: Mapping[str, Collection[Any]],
    required: Collection[str],
    instead: Mapping[str, Schema] | None = None,
) -> Schema:
    """A request. `instead`: fields that are read elsewhere."""
    properties: dict[str, Schema] = {name: {} for name in sorted(WITHOUT_EFFECT)}
    properties |= {name: {"enum": [*values, None]} for name, values in neutral.items()}
    for name, kind in fields.items():
        schema = {**kind.schema, **RANGES.get(name, {})}
        properties[name] = schema if name in required else maybe(schema)
    properties |= instead or {}
    return table(properties, but=set(properties) - set(required), more=NULL)


def requests(limits: Limits) -> dict[str, Schema]:
    """Bodies by path, with the limits that a schema can say."""
    stop = {"type": "string", "minLength": 1, "maxLength": limits.stop_characters}
    limited = {
        "n": maybe({"type": "integer", "minimum": 1, "maximum": limits.n}),
        "stop": maybe({"anyOf": [stop, {**rows(stop), "maxItems": limits.stops}]}),
        "logit_bias": maybe({**BIASES.schema, "maxProperties": limits.biases}),
        "structured_outputs": maybe(STRUCTURED),
        "stream_options": maybe(STREAM_OPTIONS),
    }
    chat = {**SERVED_CHAT, **limited, "tools": maybe({**rows(TOOL), "maxItems": limits.tools})}
    most = {"minimum": 0, "maximum": openai.MOST_LOGPROBS}
    texts = {
        **limited,
        "logprobs": maybe({**INTEGER.schema, **most}),
        "max_tokens": maybe({**INTEGER.schema, "minimum": 0}),
    }
    form = {"encoding_format": maybe({"enum": ["float", "base64"]})}
    return {
        openai.CHAT: body(openai.CHAT_FIELDS, openai.CHAT_NEUTRAL, ("messages",), chat),
        openai.COMPLETIONS: {
            **body(openai.COMPLETION_FIELDS, openai.COMPLETION_NEUTRAL, ("prompt",), texts),
            **NO_TOKENS_ONLY_ECHOED,
        },
        openai.EMBEDDINGS: body(openai.EMBEDDING_FIELDS, openai.EMBEDDING_NEUTRAL, ("input",), form),
        openai.RESPONSES: body(responses.FIELDS, responses.NEUTRAL, ("input",), {"logit_bias": limited["logit_bias"]}),
        "/tokenize": body(openai.TOKENIZE_FIELDS, {}, (), {"messages": maybe(MESSAGES)}),
        "/detokenize": body(openai.DETOKENIZE_FIELDS, {}, ("tokens",)),
    }


# ---- answers --------------------------------------------------------------------------------------------------------

ERROR = table(
    {"error": table({"message": STRING, "type": STRING, "param": maybe(STRING), "code": maybe(STRING)}, more=False)}
)
USAGE = table(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": table({"cached_tokens": COUNT}),
    }
)
REASON = {"enum": ["stop", "length", "tool_calls"]}
CALL = table(
    {"id": STRING, "type": {"const": "function"}, "function": table({"name": STRING, "arguments": STRING}, more=False)}
)
LOGPROB = table({"token": STRING, "logprob": NUMBER, "bytes": maybe(rows(COUNT)), "top_logprobs": rows({})})
CHAT_CHOICE = table(
    {
        "index": COUNT,
        "message": table(
            {"role": {"const": "assistant"}, "content": maybe(STRING), "refusal": NULL, "tool_calls": rows(CALL)},
            but=("tool_calls",),
            more=False,
        ),
        "logprobs": maybe(table({"content": rows(LOGPROB), "refusal": NULL})),
        "finish_reason": REASON,
    },
    more=False,
)
TEXT_CHOICE = table(
    {
        "index": COUNT,
        "text": STRING,
        "logprobs": maybe(
            table(
                {
                    "tokens": rows(STRING),
                    "token_logprobs": rows(maybe(NUMBER)),
                    "top_logprobs": rows(maybe({"type": "object", "additionalProperties": NUMBER})),
                    "text_offset": rows(COUNT),
                }
            )
        ),
        "finish_reason": REASON,
    },
    more=False,
)
MODEL = table(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": STRING,
        "max_model_len": COUNT,
        "parent": STRING,
    },
    but=("parent",),
    more=False,
)


def answered(kind: str, choice: Schema) -> Schema:
    head = {"id": STRING, "object": {"const": kind}, "created": COUNT, "model": STRING}
    return table({**head, "choices": rows(choice), "usage": USAGE}, more=False)


ANSWERS: dict[str, Schema] = {
    openai.CHAT: answered("chat.completion", CHAT_CHOICE),
    openai.COMPLETIONS: answered("text_completion", TEXT_CHOICE),
    openai.EMBEDDINGS: table(
        {
            "object": {"const": "list"},
            "data": rows(
                table(
                    {"object": {"const": "embedding"}, "index": COUNT, "embedding": {"anyOf": [STRING, rows(NUMBER)]}}
                )
            ),
            "model": STRING,
            "usage": table({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        }
    ),
    openai.RESPONSES: table(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": COUNT,
            "status": {"enum": ["completed", "incomplete"]},
            "model": STRING,
            "output": rows(table({"id": STRING, "type": {"enum": ["message", "function_call"]}, "status": STRING})),
            "usage": table({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}),
        }
    ),
    "/tokenize": table(
        {"count": COUNT, "max_model_len": COUNT, "tokens": rows(COUNT), "token_strs": maybe(rows(maybe(STRING)))},
        more=False,
    ),
    "/detokenize": table({"prompt": STRING}, more=False),
    "/v1/models": table({"object": {"const": "list"}, "data": rows(MODEL)}, more=False),
    "/v1/models/{name}": MODEL,
    "/health/live": table({"status": {"const": "live"}}, more=False),
    "/health/ready": table({"status": {"const": "ready"}}, more=False),
    "/status": table({"snello": STRING, "ready": TRUTH, "requests_inside": COUNT, "models": rows({"type": "object"})}),
    "/proof/{name}": table({"sentence": STRING, "sections": rows({"type": "object"})}, more=False),
    "/openapi.json": {"type": "object"},
}
STREAMED = (openai.CHAT, openai.COMPLETIONS, openai.RESPONSES)
SAYS = {
    openai.CHAT: "The next message of a conversation",
    openai.COMPLETIONS: "What follows texts or token ids",
    openai.EMBEDDINGS: "A vector of each text",
    openai.RESPONSES: "The next items of a conversation",
    "/tokenize": "A text, or messages by the template, as tokens",
    "/detokenize": "Tokens as text",
    "/v1/models": "What is served",
    "/v1/models/{name}": "One of what is served",
    "/health/live": "Whether the process is there",
    "/health/ready": "Whether requests are taken; 503 from the moment the server was told to stop",
    "/metrics": "Counts for Prometheus",
    "/status": "What the server is doing",
    "/proof/{name}": "What a model's receipts say",
    "/openapi.json": "This document",
}
BUSY = (408, 413, 429, 500, 503, 504)  # beside what a request itself got wrong


# ---- the document ---------------------------------------------------------------------------------------------------


def document(limits: Limits, models: Models, *, keys: bool) -> Schema:
    """All of it. `keys`: who calls needs one."""
    from snello import __version__

    bodies = {path: _named(path, asked, models) for path, asked in requests(limits).items()}
    paths = {path: {"post" if path in bodies else "get": _operation(path, bodies, models, keys)} for path in SAYS}
    whole: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Snello", "version": __version__, "description": "OpenAI's protocol over Snello's engine."},
        "paths": paths,
    }
    if keys:
        whole["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    return whole


def _named(path: str, asked: Schema, models: Models) -> Schema:
    """With the names of the models that answer it; one that is alone may go unnamed."""
    url = openai.CHAT if path == openai.RESPONSES else path
    every = path in ("/tokenize", "/detokenize")
    names = {"enum": [name for name, served in models.items() if every or url in served.urls]}
    alone = len(models.engines()) == 1
    properties = {**asked["properties"], "model": maybe(names) if alone else names}
    return {**asked, "properties": properties, "required": [*asked["required"], *(() if alone else ("model",))]}


def _operation(path: str, bodies: Mapping[str, Schema], models: Models, keys: bool) -> Schema:
    name, asked = re.sub(r"\W+", "_", path.removeprefix("/v1")).strip("_"), bodies.get(path)
    operation: Schema = {"operationId": name, "summary": SAYS[path], "responses": _responses(path, asked is not None)}
    if "{name}" in path:
        known = {"enum": list(models)}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": known}]
    if asked is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": asked}}}
    if keys and not path.startswith("/health/"):
        operation["security"] = [{"key": []}]
    return operation


def _responses(path: str, takes_body: bool) -> Schema:
    refusals = (400, 401, 403, 404, *(BUSY if takes_body else ()))
    found = {str(status): {"description": "refused", "content": _json(ERROR)} for status in refusals}
    if path == "/health/ready":
        found["503"] = {"description": "stopping", "content": _json(table({"status": {"const": "stopping"}}))}
    content = _json(ANSWERS[path]) if path in ANSWERS else {"text/plain": {"schema": STRING}}
    if path in STREAMED:
        content |= {"text/event-stream": {"schema": STRING}}
    return {"200": {"description": "answered", "content": content}, **found}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
