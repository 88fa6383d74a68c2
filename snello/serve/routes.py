"""What each route does: read, prepare, answer. One table of routes at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from snello.serve import answers, openai
from snello.serve.answering import (
    Events,
    Hearing,
    Record,
    Source,
    Talk,
    begin,
    streamed,
    streamed_response,
    whole,
    whole_response,
)
from snello.serve.app import App, Handler, as_json, read_json
from snello.serve.cached import cache_control
from snello.serve.errors import RequestError
from snello.serve.fields import read_fields
from snello.serve.gate import LEAST_RETRY
from snello.serve.metrics import CONTENT_TYPE
from snello.serve.openapi import document
from snello.serve.pages import page_file, proof_of
from snello.serve.prepare import aside, encoded, prepare
from snello.serve.reading import Reading, read_chat, read_completion, read_embedding
from snello.serve.responses import ResponseWriter, own_names, read_response
from snello.serve.served import Served
from snello.serve.sse import Disconnected, EventStream, event, unless_gone
from snello.serve.status import status_of

GRACE_SECONDS = 30.0  # that a slow reader has after the deadline
SOURCE_HEADER = "x-snello-source"  # where an answer came from
TIMEOUT_HEADER = "x-request-timeout"  # seconds, less than the server's own


# ---- answers --------------------------------------------------------------------------------------------------------


async def chat(app: App, request: Request) -> Any:
    reading = read_chat(await _body(app, request), app.options.limits)
    return await _completed(app, request, reading, openai.CHAT, "chatcmpl")


async def completions(app: App, request: Request) -> Any:
    reading = read_completion(await _body(app, request), app.options.limits)
    return await _completed(app, request, reading, openai.COMPLETIONS, "cmpl")


async def _body(app: App, request: Request) -> dict[str, Any]:
    try:
        return await read_json(app, request)
    except ClientDisconnect:
        raise Disconnected from None


async def responses(app: App, request: Request) -> Any:
    reading, repeated = read_response(await _body(app, request), app.options.limits)
    served, record = _begin(app, request, reading, openai.CHAT), request.scope["record"]
    writer = ResponseWriter(record.id, served.name, int(time.time()), repeated)
    with own_names():
        return await _answer(app, request, reading, served, _Response(writer))


async def _completed(app: App, request: Request, reading: Reading, url: str, kind: str) -> Any:
    """A chat or a completion."""
    served = _begin(app, request, reading, url)
    head = answers.Head(id=f"{kind}-{request.scope['record'].id}", model=served.name, created=int(time.time()))
    return await _answer(app, request, reading, served, _Completion(head))


def _begin(app: App, request: Request, reading: Reading, url: str) -> Served:
    served = _served(app, request, reading.request.model)
    served.check_url(url)
    request.scope["record"].stream = reading.request.stream
    return served


async def _answer(app: App, request: Request, reading: Reading, served: Served, form: _Completion | _Response) -> Any:
    """Given up wherever it is when the client hangs up."""
    record: Record = request.scope["record"]
    deadline = _deadline(app, request)
    read, keep = cache_control(request.headers.get("cache-control"))

    async def work() -> Any:
        prompts = await encoded(reading, served)
        record.prompt_tokens = sum(map(len, prompts))  # whatever becomes of it
        prepared = await prepare(reading, served, prompts, request.scope["caller"], deadline)
        prepared = replace(prepared, read=read, keep=keep)
        talk = await begin(prepared, record, keep=app.options.log_prompts)
        if not reading.request.stream:
            body = await form.whole(talk, app.source)
            return as_json(body, headers={SOURCE_HEADER: record.source})
        hearing = app.source(prepared, record)
        await anext(hearing)  # taken, or refused with a status of its own
        return _event_stream(record, form, form.streamed(talk, hearing), deadline)

    return await unless_gone(work(), request.receive)


@dataclass(frozen=True)
class _Completion:
    """Answers as chats and completions have them."""

    head: answers.Head

    def whole(self, talk: Talk, source: Source) -> Awaitable[dict[str, Any]]:
        return whole(talk, self.head, source)

    def streamed(self, talk: Talk, hearing: Hearing) -> Events:
        return streamed(talk, self.head, hearing)

    def failed(self, error: RequestError) -> bytes:
        return event(error.body())


@dataclass(frozen=True)
class _Response:
    """Answers as Responses have them."""

    writer: ResponseWriter

    def whole(self, talk: Talk, source: Source) -> Awaitable[dict[str, Any]]:
        return whole_response(talk, source, self.writer)

    def streamed(self, talk: Talk, hearing: Hearing) -> Events:
        return streamed_response(talk, hearing, self.writer)

    def failed(self, error: RequestError) -> bytes:
        return self.writer.failed(error)


def _served(app: App, request: Request, name: str | None) -> Served:
    served = app.models.find(name)
    request.scope["record"].model = served.name
    return served


def _deadline(app: App, request: Request) -> float:
    """On the loop's clock."""
    seconds, given = app.options.limits.seconds, request.headers.get(TIMEOUT_HEADER)
    if given is not None:
        try:
            asked = float(given)
        except ValueError:
            asked = 0.0
        if not 0 < asked < float("inf"):
            message = f"{TIMEOUT_HEADER} is {given!r}; it must be seconds, over 0"
            raise RequestError(message, param=TIMEOUT_HEADER, code="invalid_value")
        seconds = min(seconds, asked)
    return asyncio.get_running_loop().time() + seconds


def _event_stream(record: Record, form: _Completion | _Response, events: Events, deadline: float) -> EventStream:
    def ended(how: str) -> None:
        record.ended = how

    def failed(error: RequestError) -> bytes:
        record.code = error.code
        return form.failed(error)

    left = deadline - asyncio.get_running_loop().time() + GRACE_SECONDS
    return EventStream(events, seconds=left, failed=failed, ended=ended, headers={SOURCE_HEADER: record.source})


async def embeddings(app: App, request: Request) -> Response:
    asked = read_embedding(await _body(app, request), app.options.limits)
    served = _served(app, request, asked.model)
    served.check_url(openai.EMBEDDINGS)
    response: Response = await unless_gone(_embed(app, request, served, asked), request.receive)
    return response


async def _embed(app: App, request: Request, served: Served, asked: openai.EmbeddingRequest) -> Response:
    executor, record = served.llm.executor, request.scope["record"]
    size = sum(len(text) for text in asked.prompts if isinstance(text, str))
    prompts = await aside(size, lambda: [openai.prompt_tokens(text, served.llm.encode) for text in asked.prompts])
    record.prompt_tokens = total = sum(map(len, prompts))
    for prompt in prompts:
        openai.check_prompt(prompt, executor.context, executor.spec.vocab_size, answer=False, param="input")
    vectors = list[np.ndarray]()
    with served.gate.admitted(request.scope["caller"], total):
        try:
            async with asyncio.timeout_at(_deadline(app, request)):
                for prompt in prompts:
                    vectors.append(await served.worker.call(_encoding(executor, prompt)))
        except TimeoutError:
            raise RequestError("the request took longer than it may", code="deadline_exceeded", status=504) from None
    head = answers.Head(id="", model=served.name)
    return as_json(answers.embedding_body(head, vectors, total, as_base64=asked.base64))


def _encoding(executor: Any, prompt: Sequence[int]) -> Any:
    return lambda: executor.encode(prompt)


# ---- words and tokens -----------------------------------------------------------------------------------------------


OF_ONE = {  # fields that ask for something of a prompt alone, or of messages alone
    "prompt": {"add_special_tokens"},
    "messages": {"add_generation_prompt", "chat_template_kwargs"},
}


async def tokenize(app: App, request: Request) -> Response:
    given = read_fields(await _body(app, request), openai.TOKENIZE_FIELDS, neutral={}, required=())
    if ("prompt" in given) == ("messages" in given):
        raise RequestError("give a prompt or messages", param="prompt", code="missing_required_parameter")
    kind, other = ("prompt", "messages") if "prompt" in given else ("messages", "prompt")
    for name in sorted(name for name in OF_ONE[other] if given.get(name)):
        message = f"{name} belongs to {other}, and has no meaning for {kind}"
        raise RequestError(message, param=name, code="unsupported_parameter")
    served = _served(app, request, given.get("model"))
    tokenizer = served.llm.tokenizer
    if "prompt" in given:
        special = given.get("add_special_tokens", True)
        ids = await aside(len(given["prompt"]), lambda: tokenizer.encode(given["prompt"], special))
    else:
        body = {"messages": given["messages"], "chat_template_kwargs": given.get("chat_template_kwargs")}
        asked = openai.read_request(openai.CHAT, body)
        assert isinstance(asked, openai.ChatRequest)
        begin = given.get("add_generation_prompt", True)
        ids = openai.chat_tokens(asked, tokenizer, add_generation_prompt=begin)
    strings = [tokenizer.backend.id_to_token(token) for token in ids] if given.get("return_token_strs") else None
    return as_json({"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": strings})


async def detokenize(app: App, request: Request) -> Response:
    given = read_fields(await _body(app, request), openai.DETOKENIZE_FIELDS, neutral={}, required=("tokens",))
    served = _served(app, request, given.get("model"))
    openai.check_tokens(given["tokens"], served.llm.model.spec.vocab_size, "tokens")
    return as_json({"prompt": served.llm.tokenizer.decode(given["tokens"], skip_special=False)})


# ---- about the server -----------------------------------------------------------------------------------------------


async def models(app: App, request: Request) -> Response:
    return as_json({"object": "list", "data": [served.listed() for served in app.models.values()]})


async def model(app: App, request: Request) -> Response:
    return as_json(app.models.find(request.path_params["name"]).listed())


async def live(app: App, request: Request) -> Response:
    return as_json({"status": "live"})


async def ready(app: App, request: Request) -> Response:
    if app.ready:
        return as_json({"status": "ready"})
    return as_json({"status": "stopping"}, 503, {"retry-after": str(LEAST_RETRY)})


async def metrics(app: App, request: Request) -> Response:
    return Response(app.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def proof(app: App, request: Request) -> Response:
    return as_json(await asyncio.to_thread(proof_of, app.models.find(request.path_params["name"])))


async def status(app: App, request: Request) -> Response:
    return as_json(status_of(app))


async def openapi(app: App, request: Request) -> Response:
    return as_json(document(app.options.limits, app.models, keys=app.keys is not None))


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", openai.CHAT, chat),
    ("POST", openai.COMPLETIONS, completions),
    ("POST", openai.EMBEDDINGS, embeddings),
    ("POST", openai.RESPONSES, responses),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health/live", live),
    ("GET", "/health/ready", ready),
    ("GET", "/metrics", metrics),
    ("GET", "/status", status),
    ("GET", "/proof/{name:path}", proof),
    ("GET", "/openapi.json", openapi),
    ("GET", "/", page_file),
    ("GET", "/page/{name}", page_file),
)
