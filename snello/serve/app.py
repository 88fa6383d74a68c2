"""The server as an ASGI application: who may come in, which route answers, and how every request ends.

Each request gets an id, is checked for its key and its host before anything else, and leaves a line in the log and a
count in the metrics however it ends. Whatever goes wrong becomes OpenAI's form of an error; nobody sees a traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from snello.errors import SnelloError
from snello.serve.answering import Record, Source, from_engine, without_silent
from snello.serve.cached import from_caches
from snello.serve.errors import RequestError, request_error
from snello.serve.keys import OPEN_PATHS, Caller, Keys, check_host, check_origin
from snello.serve.logs import log_request
from snello.serve.metrics import Metrics
from snello.serve.options import ServeOptions
from snello.serve.pages import is_page
from snello.serve.reading import parse_body
from snello.serve.served import Models
from snello.serve.sse import Disconnected

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_SECONDS = 60.0  # for a body to arrive
LINGER_BYTES = 4 << 20  # beyond the limit, read all the same
log = logging.getLogger("snello.serve")
Handler = Callable[["App", Request], Awaitable[Any]]


class App:
    """A server's state and its entrance.

    Args:
        models: opened; closed by the caller.
        keys: None where none are asked for.
    """

    def __init__(self, options: ServeOptions, models: Models, keys: Keys | None = None) -> None:
        from snello.serve.routes import ROUTES

        self.options, self.models, self.keys = options, models, keys
        keep_alive = options.keep_alive_seconds
        self.source: Source = without_silent(from_caches(from_engine(keep_alive), keep_alive))
        self.metrics = Metrics(models, vllm_names=options.vllm_names)
        self.started = time.monotonic()
        self.inside = 0  # requests, health and metrics aside
        self.ready = False
        routes = [Route(path, _bound(self, handler), methods=[method]) for method, path, handler in ROUTES]
        self._router = Router(routes, redirect_slashes=False)

    # ---- life

    def start(self) -> None:
        """Starts the engines' threads; on the loop."""
        loop = asyncio.get_running_loop()
        for served in self.models.engines():
            served.worker.start(loop)
        self.ready = True

    def close_door(self) -> None:
        """Lets nobody in any more; who is inside goes on."""
        self.ready = False
        for served in self.models.engines():
            served.gate.closed = True

    async def drained(self, seconds: float) -> bool:
        """Waits until nobody is inside; False: some were, after so long, and were ended with an error."""
        until = time.monotonic() + seconds
        while self.inside and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if not self.inside:
            return True
        for served in self.models.engines():
            served.worker.fail_all(stopped())
        return False

    # ---- one request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.close_door()
        for served in self.models.engines():
            served.worker.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record(id=_request_id(scope), path=scope["path"])
        answer = _Answer(send, record)
        counted = scope["path"].startswith("/v1/")
        self.inside += counted
        try:
            caller = self._caller(scope)
            record.caller = caller.name
            scope.update(app=self, record=record, caller=caller)
            await self._router(scope, receive, answer.send)
        except Disconnected:
            record.status, record.ended = 499, "disconnected"
        except asyncio.CancelledError:  # the web server ends, and waits no longer
            await answer.refuse(stopped())
        except HTTPException as error:
            said = RequestError(
                _http_words(scope, error), code=HTTP_CODES.get(error.status_code), status=error.status_code
            )
            await answer.refuse(said, error.headers)
        except SnelloError as error:
            await answer.refuse(request_error(error))
        except Exception as error:
            log.error("a request failed", exc_info=error, extra={"fields": {"request": record.id}})
            said = RequestError("something went wrong here; the log has the details", code="internal_error", status=500)
            await answer.refuse(said)
        finally:
            self.inside -= counted
            self._ended(scope, record)

    def _caller(self, scope: Scope) -> Caller:
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"host", b"origin")}
        if scope["path"] in OPEN_PATHS:
            return Caller("anyone")
        if self.keys is not None:
            if is_page(scope["path"]):
                return Caller("anyone")
            return self.keys.caller(_latin(headers.get(b"authorization")))
        if self.options.on_loopback:
            check_host(_latin(headers.get(b"host")))
            check_origin(_latin(headers.get(b"origin")))
        return Caller()

    def _ended(self, scope: Scope, record: Record) -> None:
        route = scope.get("route")
        pattern = route.path if isinstance(route, Route) else "other"
        self.metrics.ended(record, time.monotonic(), pattern)
        if record.path not in OPEN_PATHS and record.path != "/metrics":
            log_request(record)


def stopped() -> RequestError:
    """What those hear who are still inside at the end."""
    return RequestError("the server was stopped", code="shutting_down", status=503, retry_after=1)


class _Answer:
    """Sends, and knows whether it has begun; adds the request's id to every response."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self._record, self._begun = send, record, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._record.status = message["status"]
            extra = [(b"x-request-id", self._record.id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", ()), *extra]
        await self._send(message)

    async def refuse(self, error: RequestError, more: Mapping[str, str] | None = None) -> None:
        """`more`: headers beside those that every error has."""
        self._record.code = error.code
        if self._begun:
            self._record.ended = "failed"
            return
        headers = dict(more or {})
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        response = JSONResponse(error.body(), status_code=error.status, headers=headers)
        await response({"type": "http"}, _nothing, self.send)


HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def _http_words(scope: Scope, error: HTTPException) -> str:
    if error.status_code == 405:
        return f"{scope['path']} does not take {scope['method']}"
    return f"there is no {scope['path']}" if error.status_code == 404 else str(error.detail)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _latin(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _request_id(scope: Scope) -> str:
    """The caller's own, where it is fit for a log; else a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if ID.fullmatch(given) else uuid.uuid4().hex


def _bound(app: App, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Any:
        return await handler(app, request)

    return endpoint


async def read_json(app: App, request: Request) -> dict[str, Any]:
    """The body, as far as the limit allows. One that is a little too large is read to its end and forgotten: who is
    hung up on while sending may never see why.

    Raises:
        RequestError: 413: it is larger; 408: it does not come; 400: it is no JSON table.
    """
    most, parts, size = app.options.limits.body_bytes, list[bytes](), 0
    said = request.headers.get("content-length", "")
    too_large = RequestError(f"the body is larger than {most:,} bytes", code="body_too_large", status=413)
    if said.isdecimal() and int(said) > most + LINGER_BYTES:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most + LINGER_BYTES:
                    break
                parts.append(part)
                if size > most:
                    parts.clear()
    except TimeoutError:
        raise RequestError("the body did not come in time", code="timeout", status=408) from None
    if size > most:
        raise too_large
    return parse_body(b"".join(parts), app.options.limits)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Numbers that JSON does not have are a bug, not `NaN`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(), status_code=status, headers=headers, media_type="application/json")
