"""The caches of answers as a source: whoever asks what runs now or was answered before hears that.

Only requests whose answer is settled (temperature 0, or a seed) and that have one prompt are looked up; all others go
straight to the next source. A shared generation has no deadline of its own, so that the impatience of the one who began
it ends nobody else's: each listener keeps its own deadline, and the last one to leave cancels.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from snello.engine.request import Chunk
from snello.serve.answering import Hearing, Record, Source, seconds_left
from snello.serve.caches.identity import Asked
from snello.serve.openai import CHAT, COMPLETIONS, ChatRequest
from snello.serve.prepare import Prepared


def cache_control(header: str | None) -> tuple[bool, bool]:
    """Whether an answer may be read, and whether it may be kept: `no-cache` and `no-store` of a client."""
    words = {word.strip().lower() for word in (header or "").split(",")}
    return "no-cache" not in words, "no-store" not in words


def from_caches(source: Source, keep_alive: float) -> Source:
    """`source` behind the caches of its models; after `keep_alive` seconds without news it says so."""

    async def cached(prepared: Prepared, record: Record) -> Hearing:
        caches = prepared.served.caches
        if caches is None or not prepared.seeded or len(prepared.prompts) != 1:
            async with aclosing(source(prepared, record)) as hearing:
                async for heard in hearing:
                    yield heard
            return
        prepared.served.gate.check_open()
        shared, news, refused = replace(prepared, deadline=math.inf), asyncio.Event(), True

        async def begin() -> AsyncIterator[Chunk]:
            nonlocal refused
            try:
                async with aclosing(source(shared, record)) as hearing:
                    async for heard in hearing:
                        refused = False
                        news.set()
                        for _, chunk in heard:
                            yield chunk
            finally:
                news.set()

        said = prepared.reading.request.messages if isinstance(prepared.reading.request, ChatRequest) else ()
        controls: Mapping[str, bool] = {"read": prepared.read, "keep": prepared.keep}
        async with caches.answer(asked_of(prepared), begin, messages=said, **controls) as reply:
            record.source = reply.source
            chunks, unfinished = aiter(reply.chunks), prepared.num_choices
            if reply.source != "computed" or (await _taken(news, seconds_left(prepared)) and not refused):
                yield []
            while unfinished:
                chunk = await _next(chunks, min(keep_alive, seconds_left(prepared)))
                if chunk is not None:
                    unfinished -= chunk.finish_reason is not None
                    yield [(0, chunk)]
                else:
                    yield []
            async for _ in chunks:  # it ends when the answer is kept; who leaves before gives that up
                pass

    return cached


async def _taken(news: asyncio.Event, seconds: float) -> bool:
    """Waits until the generation was taken or refused; False: it was neither for so long."""
    try:
        async with asyncio.timeout(seconds):
            return await news.wait()
    except TimeoutError:
        return False


async def _next(chunks: AsyncIterator[Chunk], seconds: float) -> Chunk | None:
    """None: nothing was said for so long. One timer and no task; a stored answer never waits, so nothing is lost."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(chunks)
    except TimeoutError:
        return None


def asked_of(prepared: Prepared) -> Asked:
    """What the chunks of an answer depend on; how they are laid out afterwards (echo, calls) is made anew each time."""
    reading, params = prepared.reading, prepared.params[0]
    fields: dict[str, Any] = {"tools": reading.tools is not None, "rules": reading.rules is not None}
    if isinstance(reading.request, ChatRequest):
        fields["variables"] = dict(reading.request.variables)  # a similar question's tokens do not show them
    return Asked(
        tokens=prepared.prompts[0],
        params=replace(params, seed=None) if params.temperature == 0 else params,  # the likeliest token has no seed
        url=CHAT if isinstance(reading.request, ChatRequest) else COMPLETIONS,
        salt=prepared.caller.salt,
        fields=fields,
    )
