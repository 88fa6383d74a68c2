"""Server-sent events over ASGI: what is said goes out as it comes, and who hangs up is noticed at once.

A stream that says nothing for a while sends a comment, so that no proxy closes it. A client that reads slowly holds
back its own stream only: what the engine has said waits here, at most one answer of it. After the first byte an error
can only be told inside the stream, as `data: {"error": ...}`, and the stream ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from snello.serve.errors import RequestError

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
COMMENT = b": the model is at work\n\n"
log = logging.getLogger("snello.serve")


class Disconnected(Exception):
    """The client has gone."""


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of this work; given up when the client hangs up. Starlette itself would let it run on.

    Raises:
        Disconnected: the client has gone; the work was cancelled and has ended.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event; `name` where clients tell events apart by it."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream:
    """A response that streams.

    Args:
        events: bytes as they come; closed when the client has gone.
        seconds: after which the stream is given up whatever happens: a reader who does not read included.
        failed: how an error is told inside the stream. ended: told once how it ended.
        headers: beside those of every stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        seconds: float,
        failed: Callable[[RequestError], bytes],
        ended: Callable[[str], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events, self._seconds = events, seconds
        self._headers = [*HEADERS, *((name.encode(), value.encode()) for name, value in (headers or {}).items())]
        self._failed, self._ended = failed, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        how = "failed"
        try:
            async with asyncio.timeout(self._seconds):
                how = await unless_gone(self._send(send), receive)
        except (Disconnected, OSError):
            how = "disconnected"
        except TimeoutError:
            how = "too slow"
        finally:
            self._ended(how)

    async def _send(self, send: Send) -> str:
        """How it ended."""
        how = "failed"
        await send({"type": "http.response.start", "status": 200, "headers": [*self._headers]})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            how = "done"
        except RequestError as error:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            said = RequestError("something went wrong here; the log has the details", code="internal_error", status=500)
            await send({"type": "http.response.body", "body": self._failed(said), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return how
