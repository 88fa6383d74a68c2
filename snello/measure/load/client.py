"""Sends requests by the clock, streamed, and notes when each piece of an answer came.

One process, one thread, one connection a request, and nothing is parsed before the last answer has ended: on a machine
that client and server share, what the client computes the server lacks. How late requests were sent and how much of a
core the client took are measured with the rest.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from snello.errors import SnelloError
from snello.measure.load.plans import Request

READ_BYTES = 1 << 16
SAID = 300  # characters of an error that are kept


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server of OpenAI's protocol. `url`: as clients are given it, with or without /v1."""

    url: str
    model: str | None = None
    key: str | None = None
    timeout: float = 600.0

    @property
    def parts(self) -> tuple[str, int, bool, str]:
        """Host, port, whether encrypted, and the path before /completions."""
        found = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
        try:
            port = found.port
        except ValueError:
            port = -1
        if found.scheme not in ("http", "https") or not found.hostname or port == -1:
            raise SnelloError(f"{self.url!r} is no address of a server", "like http://127.0.0.1:8080/v1")
        secure = found.scheme == "https"
        path = found.path.rstrip("/")
        return found.hostname, port or (443 if secure else 80), secure, path if path.endswith("/v1") else f"{path}/v1"


@dataclass
class Answer:
    """Seconds since the start. `times` and `lines` are those of the stream's `data:` lines; `status` 0: none came."""

    sent: float = 0.0
    status: int = 0
    error: str = ""
    retry_after: bool = False
    times: list[float] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    ended: float = 0.0


@dataclass(frozen=True)
class Run:
    """`busy`: share of one core that this process used."""

    answers: list[Answer]
    seconds: float
    busy: float


Step = Callable[[int], None]


def silent(done: int) -> None:
    """For who does not watch."""


def ask(target: Target, requests: Sequence[Request], *, streams: int | None = None, step: Step = silent) -> Run:
    """All requests, each at its time; with `streams` so many at once, whatever their times."""
    return asyncio.run(_ask(target, requests, streams, step))


async def _ask(target: Target, requests: Sequence[Request], streams: int | None, step: Step) -> Run:
    answers = [Answer() for _ in requests]
    bodies = [_body(target, request, number) for number, request in enumerate(requests)]
    start, used = time.perf_counter(), time.process_time()
    waiting, done = iter(range(len(requests))), 0

    async def one(number: int) -> None:
        nonlocal done
        try:
            await asyncio.wait_for(_send(target, bodies[number], answers[number], start), target.timeout)
        except TimeoutError:
            answers[number].error = f"no end within {target.timeout:g} s"
        except (OSError, h11.RemoteProtocolError) as error:
            answers[number].error = str(error) or type(error).__name__
        answers[number].ended = time.perf_counter() - start
        done += 1
        step(done)

    async def on_time(number: int) -> None:
        await asyncio.sleep(max(0.0, requests[number].at - (time.perf_counter() - start)))
        await one(number)

    async def somebody() -> None:
        for number in waiting:
            await one(number)

    people = [on_time(n) for n in waiting] if streams is None else [somebody() for _ in range(streams)]
    await asyncio.gather(*people)
    seconds = time.perf_counter() - start
    return Run(answers, seconds, (time.process_time() - used) / max(seconds, 1e-9))


def _body(target: Target, request: Request, number: int) -> bytes:
    wishes: dict[str, Any] = {
        "prompt": request.prompt,
        "max_tokens": request.answer,
        "ignore_eos": True,
        "temperature": 0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(wishes if target.model is None else {"model": target.model, **wishes}).encode()


async def _send(target: Target, body: bytes, answer: Answer, start: float) -> None:
    host, port, secure, path = target.parts
    answer.sent = time.perf_counter() - start
    reader, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context() if secure else None)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", f"{host}:{port}"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        headers += [("Authorization", f"Bearer {target.key}")] if target.key else []
        writer.write(connection.send(h11.Request(method="POST", target=f"{path}/completions", headers=headers)) or b"")
        writer.write(connection.send(h11.Data(data=body)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        await _read(reader, connection, answer, start)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, connection: h11.Connection, answer: Answer, start: float) -> None:
    rest, refusal = b"", b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            answer.status = event.status_code
            answer.retry_after = any(name == b"retry-after" for name, _ in event.headers)
        elif isinstance(event, h11.Data) and answer.status >= 400:
            refusal += bytes(event.data)
        elif isinstance(event, h11.Data):
            now = time.perf_counter() - start
            *whole, rest = (rest + bytes(event.data)).split(b"\n")
            data = [line[5:].strip() for line in whole if line.startswith(b"data:")]
            answer.lines += data
            answer.times += [now] * len(data)
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            break
    if answer.status >= 400:
        answer.error = _message(refusal)


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's form or in any other."""
    try:
        return str(json.loads(body)["error"]["message"])[:SAID]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:SAID]


def model_of(target: Target) -> str:
    """The name of the server's only model.

    Raises:
        SnelloError: nobody answers there, or more than one model does.
    """
    names = [str(item["id"]) for item in asyncio.run(_get(target, "/models")).get("data", [])]
    if len(names) != 1:
        raise SnelloError(f"the server has {len(names)} models: {', '.join(names) or '-'}", "choose one with --name")
    return names[0]


async def _get(target: Target, route: str) -> dict[str, Any]:
    host, port, secure, path = target.parts
    hint = "start it, or look at the address: like http://127.0.0.1:8080/v1"
    body = bytearray()
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context() if secure else None)
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", f"{host}:{port}"), ("Connection", "close")]
        headers += [("Authorization", f"Bearer {target.key}")] if target.key else []
        writer.write(connection.send(h11.Request(method="GET", target=f"{path}{route}", headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        status = 0
        while not isinstance(event := connection.next_event(), (h11.EndOfMessage, h11.ConnectionClosed)):
            if event is h11.NEED_DATA:
                connection.receive_data(await asyncio.wait_for(reader.read(READ_BYTES), target.timeout))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
        writer.close()
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        raise SnelloError(f"no server answers at {target.url}: {error or 'it says nothing'}", hint) from error
    if status in (401, 403):
        raise SnelloError(f"the server at {target.url} wants another key", "give it with --key-file")
    try:
        found = json.loads(bytes(body)) if status == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SnelloError(f"{target.url} answers {status} to {path}{route}", hint)
    return found
