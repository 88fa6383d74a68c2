"""Requests that nobody would write, by hypothesis: every one is answered, or refused in OpenAI's form; what is answered
is what OpenAI's own types say; nothing is a bug, hangs, or leaves a page behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel

from snello.serve.openai import CHAT_FIELDS, COMPLETION_FIELDS
from snello.serve.options import ServeOptions
from snello.serve.responses import FIELDS
from tests.serve.test_server import SAY, VALUES
from tests.serve.world import Running, make_chat, make_encoder, parse, serving

CHAT, TEXTS, VECTORS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
SOUND: dict[str, dict[str, Any]] = {  # what is asked for before something is put into it
    CHAT: {"model": "chat", "messages": SAY, "max_tokens": 2},
    TEXTS: {"model": "chat", "prompt": "a", "max_tokens": 2},
    VECTORS: {"model": "bert", "input": "a"},
    RESPONSES: {"model": "chat", "input": "a", "max_output_tokens": 2},
    "/tokenize": {"model": "chat", "prompt": "a"},
    "/detokenize": {"model": "chat", "tokens": [1]},
}
TYPES: dict[str, type[BaseModel]] = {
    CHAT: ChatCompletion,
    TEXTS: Completion,
    VECTORS: CreateEmbeddingResponse,
    RESPONSES: Response,
}
NAMES = sorted({*CHAT_FIELDS, *COMPLETION_FIELDS, *FIELDS, *(name for body in SOUND.values() for name in body)})
EXTRA = ["stream_options", "structured_outputs", "response_format", "tools", "tool_choice", "parallel_tool_calls"]
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST_TOKENS = 4  # what a sound length may be: ten thousand answers are asked for


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    chat, encoder = make_chat(folder / "chat"), make_encoder(folder / "bert")
    with serving(ServeOptions(models=(f"chat={chat}", f"bert={encoder}"), max_num_seqs=4)) as here:
        yield here


def anything() -> st.SearchStrategy[Any]:
    """Any JSON, and what is nearly right."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    names = st.text(max_size=8) | st.sampled_from(["type", "role", "content", "function", "schema", "name"])
    trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))
    return st.sampled_from(VALUES) | trees


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(SOUND)))
    body = dict(SOUND[path])
    for name in draw(st.lists(st.sampled_from(NAMES + EXTRA) | st.text(max_size=6), max_size=3)):
        body[name] = draw(anything())
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[name]
    if draw(st.booleans()):
        body["stream"] = True
    return path, shortened(path, body)


def shortened(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A request that could be answered at length is held short; one of a wrong length stays as it is."""
    if path in (CHAT, TEXTS, RESPONSES):
        own = "max_output_tokens" if path == RESPONSES else "max_tokens"
        given = [name for name in LENGTHS if body.get(name) is not None]
        for name in given or [own]:
            value = body.get(name)
            if value is None or (type(value) is int and value > MOST_TOKENS):
                body[name] = MOST_TOKENS
    return body


def check_refusal(said: Any, status: int) -> None:
    assert status in (400, 404, 413), said
    error = said["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]


def check(here: Running, path: str, body: dict[str, Any]) -> bool:
    """Whether it was answered."""
    response = here.client.post(path, content=json.dumps(body).encode())
    if response.status_code != 200:
        check_refusal(response.json(), response.status_code)
        return False
    if response.headers["content-type"].startswith("text/event-stream"):
        check_stream(path, parse(response.content))
    elif path in TYPES:
        TYPES[path].model_validate(response.json())
    return True


def check_stream(path: str, events: list[Any]) -> None:
    """A stream ends as one must, and each event is of its type."""
    if path == RESPONSES:
        assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
        Response.model_validate(events[-1]["response"])
        return
    assert events[-1] == "[DONE]", events[-1]
    rows = [row for event in events[:-1] for row in event["choices"]]
    for event in events[:-1]:
        if path == CHAT:
            ChatCompletionChunk.model_validate(event)
        else:  # the client's type is that of whole answers, in which every choice has ended
            ended = [{**row, "finish_reason": row["finish_reason"] or "stop"} for row in event["choices"]]
            Completion.model_validate({**event, "choices": ended})
    indices = {row["index"] for row in rows}
    ends = [row["index"] for row in rows if row.get("finish_reason")]
    assert sorted(ends) == sorted(indices), "one end for each choice"


def fuzz(here: Running, count: int) -> dict[bool, int]:
    """Counts of refused and answered."""
    counts = {True: 0, False: 0}

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(requests())
    def every_one(request: tuple[str, dict[str, Any]]) -> None:
        counts[check(here, *request)] += 1

    run: Callable[[], None] = every_one
    run()
    assert here.idle("chat") and here.idle("bert")
    assert here.app.models["chat"].worker.failures == here.app.models["bert"].worker.failures == 0
    return counts


def test_a_few_hundred_requests_are_answered_or_refused(here: Running) -> None:
    counts = fuzz(here, 200)
    assert min(counts.values()) > 20, counts


@pytest.mark.slow
def test_ten_thousand_requests_are_answered_or_refused(here: Running) -> None:
    counts = fuzz(here, 10_000)
    assert sum(counts.values()) >= 10_000 and min(counts.values()) > 1000, counts


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=200), path=st.sampled_from(sorted(SOUND)), cut=st.integers(0, 60), bit=st.integers(0, 7))
def test_bytes_that_are_no_request(here: Running, raw: bytes, path: str, cut: int, bit: int) -> None:
    """Anything at all, and a sound request with one bit turned."""
    turned = bytearray(json.dumps(SOUND[path]).encode())
    turned[cut % len(turned)] ^= 1 << bit
    for content in (raw, bytes(turned)):
        response = here.client.post(path, content=content)
        if response.status_code != 200:
            check_refusal(response.json(), response.status_code)
