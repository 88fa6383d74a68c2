"""OpenAI requests as prompts and settings: chat completions, completions, embeddings.

Pure functions over plain values; a request becomes a frozen dataclass, then token ids and a `SamplingParams`. Beside
OpenAI's own fields the ones that vLLM adds are known (`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`,
`ignore_eos`, `include_stop_str_in_output`, `chat_template_kwargs`), with the same meaning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.models.tokenizer import Tokenizer
from snello.serve.errors import RequestError, request_error
from snello.serve.fields import (
    BIASES,
    BOOLEAN,
    INTEGER,
    LIST,
    NUMBER,
    PROMPTS,
    SEED,
    STOPS,
    TABLE,
    TEXT,
    TOKENS,
    Kind,
    read_fields,
    unknown_field,
)

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
Prompt: TypeAlias = str | tuple[int, ...]

COMPLETION_TOKENS = 16  # the most tokens of a completion that does not say; a chat goes on to the end of the context
NO_LIMIT = 2**31 - 1
MOST_LOGPROBS = 20

SAMPLING: dict[str, Kind] = {  # by the names of SamplingParams
    "frequency_penalty": NUMBER,
    "ignore_eos": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
    "logit_bias": BIASES,
    "max_tokens": INTEGER,
    "min_p": NUMBER,
    "n": INTEGER,
    "presence_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "seed": SEED,
    "stop": STOPS,
    "stop_token_ids": TOKENS,
    "temperature": NUMBER,
    "top_k": INTEGER,
    "top_p": NUMBER,
}
CHAT_FIELDS = SAMPLING | {
    "chat_template_kwargs": TABLE,
    "logprobs": BOOLEAN,
    "max_completion_tokens": INTEGER,
    "messages": LIST,
    "model": TEXT,
    "stream": BOOLEAN,
    "top_logprobs": INTEGER,
}
COMPLETION_FIELDS = SAMPLING | {
    "best_of": INTEGER,
    "echo": BOOLEAN,
    "logprobs": INTEGER,
    "model": TEXT,
    "prompt": PROMPTS,
    "stream": BOOLEAN,
}
EMBEDDING_FIELDS = {"encoding_format": TEXT, "input": PROMPTS, "model": TEXT}
TOKENIZE_FIELDS = {
    "model": TEXT,
    "prompt": TEXT,
    "messages": LIST,
    "add_special_tokens": BOOLEAN,
    "add_generation_prompt": BOOLEAN,
    "return_token_strs": BOOLEAN,
    "chat_template_kwargs": TABLE,
}
DETOKENIZE_FIELDS = {"model": TEXT, "tokens": TOKENS}

# What is not done here, with the values that ask for nothing.
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stream_options": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {"stream_options": (), "suffix": ("",)}
EMBEDDING_NEUTRAL: dict[str, tuple[Any, ...]] = {"dimensions": ()}

MESSAGE_FIELDS = {
    "content", "name", "reasoning", "reasoning_content", "refusal", "role", "thinking", "tool_call_id", "tool_calls",
}  # fmt: skip
RESERVED_VARIABLES = {"add_generation_prompt", "messages", "self", "special_tokens", "template", "tools"}


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """The next message of a conversation. `variables` reach the chat template."""

    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    variables: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What follows each of these texts. `echo`: the text itself comes first."""

    prompts: Sequence[Prompt]
    sampling: Mapping[str, Any]
    echo: bool = False
    model: str | None = None
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A vector of each of these texts; `base64`: as little-endian FP32 in base64."""

    prompts: Sequence[Prompt]
    base64: bool = False
    model: str | None = None


Request: TypeAlias = ChatRequest | CompletionRequest | EmbeddingRequest


# ---- bodies to requests ---------------------------------------------------------------------------------------------


def read_request(url: str, body: Mapping[str, Any]) -> Request:
    """The request that this body is.

    Raises:
        RequestError: there is no such url, or a field is wrong or asks for what is not done here.
    """
    if url not in READERS:
        known = ", ".join(READERS)
        raise RequestError(f"there is no url {url!r}; there are: {known}", param="url", code="unknown_url")
    return READERS[url](body)


def _chat(body: Mapping[str, Any]) -> ChatRequest:
    given = read_fields(body, CHAT_FIELDS, neutral=CHAT_NEUTRAL, required=("messages",))
    most = given.pop("max_completion_tokens", None)
    if most is not None:
        if given.get("max_tokens", most) != most:
            raise RequestError("max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
        given["max_tokens"] = most
    top, wanted = given.pop("top_logprobs", None), given.pop("logprobs", False)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if wanted:
        given["logprobs"] = _few("top_logprobs", top or 0)
    variables = given.get("chat_template_kwargs", {})
    for name in RESERVED_VARIABLES & set(variables):
        message = f"chat_template_kwargs may not set {name}"
        raise RequestError(message, param="chat_template_kwargs", code="invalid_value")
    return ChatRequest(
        messages=[_message(place, message) for place, message in enumerate(given["messages"])],
        sampling=_sampling({"max_tokens": NO_LIMIT, **given}),
        variables=variables,
        model=given.get("model"),
        stream=given.get("stream", False),
    )


def _completion(body: Mapping[str, Any]) -> CompletionRequest:
    given = read_fields(body, COMPLETION_FIELDS, neutral=COMPLETION_NEUTRAL, required=("prompt",))
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise RequestError("best_of is not supported here", param="best_of", code="unsupported_parameter")
    echo = given.get("echo", False)
    if "logprobs" in given:
        given["logprobs"] = _few("logprobs", given["logprobs"])
        if echo:
            message = "echo with logprobs is not supported here"
            raise RequestError(message, param="echo", code="unsupported_parameter")
    return CompletionRequest(
        prompts=_prompts(given["prompt"]),
        sampling=_sampling({"max_tokens": COMPLETION_TOKENS, **given}),
        echo=echo,
        model=given.get("model"),
        stream=given.get("stream", False),
    )


def _embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    given = read_fields(body, EMBEDDING_FIELDS, neutral=EMBEDDING_NEUTRAL, required=("input",))
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        message = f"encoding_format is {form!r}; it must be float or base64"
        raise RequestError(message, param="encoding_format", code="invalid_value")
    return EmbeddingRequest(prompts=_prompts(given["input"]), base64=form == "base64", model=given.get("model"))


READERS: dict[str, Callable[[Mapping[str, Any]], Request]] = {
    CHAT: _chat,
    COMPLETIONS: _completion,
    EMBEDDINGS: _embedding,
}


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among these fields, by the names of `SamplingParams`, in range."""
    names = {name: value for name, value in given.items() if name in SAMPLING or name == "logprobs"}
    if "logit_bias" in names:
        names["logit_bias"] = {int(token): float(bias) for token, bias in names["logit_bias"].items()}
    if "stop_token_ids" in names:
        names["stop_token_ids"] = tuple(names["stop_token_ids"])
    try:
        SamplingParams(**names)
    except SnelloError as error:
        first = error.message.split()[0]
        message = request_error(error).message
        raise RequestError(message, param=first if first in names else "stop", code="invalid_value") from None
    return names


def _few(name: str, count: int) -> int:
    if not 0 <= count <= MOST_LOGPROBS:
        raise RequestError(f"{name} is {count}; it must be 0 to {MOST_LOGPROBS}", param=name, code="invalid_value")
    return count


def _prompts(value: str | list[Any]) -> tuple[Prompt, ...]:
    """One prompt or several; a list of token ids is one."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value[0], int):
        return (tuple(value),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _message(place: int, message: Any) -> dict[str, Any]:
    """A message as chat templates expect it: parts of text become one text, joined by line ends."""
    where = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be a table with a role", param=where, code="invalid_type")
    given = {name: value for name, value in message.items() if value is not None}
    for name in set(given) - MESSAGE_FIELDS:
        raise unknown_field(f"{where}.{name}", [f"{where}.{known}" for known in MESSAGE_FIELDS])
    if not _are_calls(given.get("tool_calls", [])):
        message = f"{where}.tool_calls must be a list of calls, each with a function's name and arguments"
        raise RequestError(message, param=where, code="invalid_type")
    content = given.get("content")
    if content is None and not given.get("tool_calls"):
        raise RequestError(f"{where} has no content", param=where, code="invalid_value")
    if isinstance(content, list):
        given["content"] = "\n".join(_part(f"{where}.content[{at}]", part) for at, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of parts", param=where, code="invalid_type")
    return given


def _are_calls(value: Any) -> bool:
    """Calls as an answer has them; arguments may be read already."""
    if not isinstance(value, list):
        return False
    functions = [call.get("function") if isinstance(call, dict) else None for call in value]
    return all(
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict)
        for function in functions
    )


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(f"{where} is no text, and only text is read here", param=where, code="unsupported_content")


# ---- requests to the engine's terms ---------------------------------------------------------------------------------


def settings(sampling: Mapping[str, Any], defaults: Mapping[str, Any], seed: int | None = None) -> SamplingParams:
    """What the request says, over the checkpoint's own defaults; `seed` where the request has none."""
    return SamplingParams(**{**defaults, "seed": seed, **sampling})


def chat_tokens(request: ChatRequest, tokenizer: Tokenizer, **variables: Any) -> list[int]:
    """The conversation through the checkpoint's template, which sees these variables too."""
    messages = [_with_arguments(message) for message in request.messages]
    return tokenizer.chat(messages, **request.variables, **variables)


def _with_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Calls in a conversation carry JSON text; chat templates expect tables."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_table(call) for call in calls]} if calls else message


def _with_table(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):
        return call


def prompt_tokens(prompt: Prompt, encode: Callable[[str], list[int]]) -> list[int]:
    """A text is encoded; token ids are taken as they are."""
    return encode(prompt) if isinstance(prompt, str) else list(prompt)


def check_prompt(
    tokens: Sequence[int], context: int, vocabulary: int, *, answer: bool = True, param: str = "prompt"
) -> None:
    """Something to read, in tokens of the model, with room for it and for one token of an answer.

    Raises:
        RequestError: it is not.
    """
    if not tokens:
        raise RequestError(f"{param} is empty: there must be a token at least", param=param, code="invalid_value")
    check_tokens(tokens, vocabulary, param)
    if len(tokens) > context - answer:
        message = f"the prompt is {len(tokens):,} tokens and the context here is {context:,}"
        raise RequestError(message + ": shorten it", param=param, code="context_length_exceeded")


def check_tokens(tokens: Sequence[int], vocabulary: int, param: str) -> None:
    """Raises RequestError where a token id is not the model's."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        message = f"a token is outside the vocabulary of {vocabulary:,}"
        raise RequestError(message, param=param, code="invalid_value")
