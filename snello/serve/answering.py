"""Answers to prepared requests: from the engine, whole or as a stream.

`Source` is the one place where an answer may come from elsewhere: a function from a `Prepared` to what is heard. The
engine's is `from_engine`; a cache is another one that looks first, asks the next source where it does not know, and
keeps what it hears.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from snello.engine.pages import pages_for
from snello.engine.request import Chunk, Usage
from snello.serve import answers
from snello.serve.errors import RequestError
from snello.serve.openai import ChatRequest
from snello.serve.prepare import Prepared, voices
from snello.serve.responses import ResponseWriter
from snello.serve.served import Served
from snello.serve.sse import COMMENT, DONE, event
from snello.serve.voices import Row, Voice
from snello.serve.worker import Heard, Ticket

# Yields first an empty list, when the request is taken; then what was said, as it comes, empty where it takes long.
Hearing: TypeAlias = AsyncGenerator[list[Heard], None]
Source: TypeAlias = Callable[[Prepared, "Record"], Hearing]
Events: TypeAlias = AsyncGenerator[bytes, None]


@dataclass(kw_only=True)
class Record:
    """What became of a request, for the log and the metrics. Seconds are of this machine's monotonic clock."""

    id: str
    path: str = ""
    caller: str = ""
    model: str = ""
    stream: bool = False
    status: int = 0
    code: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first token was heard
    last: float | None = None
    source: str = "computed"  # or the cache that an answer came from, as its header says
    ended: str = "done"
    asked: Sequence[str] | None = None  # prompts, only where the log may hold them


def from_engine(keep_alive: float) -> Source:
    """The engine as a source; after `keep_alive` seconds without news it says so."""

    async def source(prepared: Prepared, record: Record) -> Hearing:
        served = prepared.served
        with served.gate.admitted(prepared.caller, prepared.most_tokens):
            ticket = Ticket(
                prompts=prepared.prompts,
                params=prepared.params,
                salt=prepared.caller.salt,
                adapter=served.adapter,
            )
            served.worker.submit(ticket)
            try:
                await ticket.admitted(seconds_left(prepared))
                yield []
                unfinished = prepared.num_choices
                while unfinished:
                    heard = await ticket.heard(min(keep_alive, seconds_left(prepared)))
                    unfinished -= sum(chunk.finish_reason is not None for _, chunk in heard)
                    yield heard
            finally:
                served.worker.cancel(ticket)

    return source


def without_silent(source: Source) -> Source:
    """`source`, which is not asked where nothing is to be said after the prompt."""
    return lambda prepared, record: (silence if prepared.reading.silent else source)(prepared, record)


async def silence(prepared: Prepared, record: Record) -> Hearing:
    """Every answer ends before its first token."""
    prepared.served.gate.check_open()
    yield []
    seconds = time.monotonic() - record.started
    for place, (prompt, params) in enumerate(zip(prepared.prompts, prepared.params, strict=True)):
        usage = Usage(prompt_tokens=len(prompt), completion_tokens=0, first_token_seconds=seconds, seconds=seconds)
        yield [(place, Chunk(text="", index=index, finish_reason="length", usage=usage)) for index in range(params.n)]


def seconds_left(prepared: Prepared) -> float:
    """Seconds until the deadline.

    Raises:
        RequestError: it has passed.
    """
    now = asyncio.get_running_loop().time()
    if now >= prepared.deadline:
        message = "the request took longer than it may; ask for fewer tokens, or try when less is going on"
        raise RequestError(message, code="deadline_exceeded", status=504)
    return prepared.deadline - now + 0.001


@dataclass(kw_only=True)
class Talk:
    """One request as it is answered: its voices, and how many tokens it took."""

    prepared: Prepared
    record: Record
    voices: Sequence[Voice]

    @property
    def firsts(self) -> list[int]:
        """The first choice of each prompt."""
        firsts = [0]
        for params in self.prepared.params:
            firsts.append(firsts[-1] + params.n)
        return firsts

    def rows(self, heard: list[Heard]) -> list[Row]:
        """What was heard, as rows."""
        firsts, rows = self.firsts, list[Row]()
        for place, chunk in heard:
            self.record.completion_tokens += chunk.token_id is not None
            rows += self.voices[firsts[place] + chunk.index].take(chunk)
            if chunk.finish_reason is not None:
                self.record.reasons.append(chunk.finish_reason)
        if heard:
            self.record.last = time.monotonic()
            self.record.first = self.record.first or self.record.last
        return rows

    def usage(self) -> dict[str, Any]:
        usages = [voice.usage for voice in self.voices]
        known = [usage for usage in usages if usage is not None]
        cached = [usages[first] for first in self.firsts[:-1]]
        return self._count(sum(u.completion_tokens for u in known), [u for u in cached if u is not None])

    def _count(self, completion: int, firsts: Sequence[Usage]) -> dict[str, Any]:
        cached = sum(usage.cached_tokens for usage in firsts)
        self.record.completion_tokens, self.record.cached_tokens = completion, cached
        return answers.usage_body(self.prepared.num_prompt, completion, cached)


async def begin(prepared: Prepared, record: Record, *, keep: bool) -> Talk:
    """The voices of a request; where a prompt is echoed with log-probabilities, these are computed now.

    Args:
        keep: the record holds what is asked.
    """
    scores = await _prompt_scores(prepared)
    if keep:
        tokenizer = prepared.served.llm.tokenizer
        record.asked = [tokenizer.decode(prompt, skip_special=False) for prompt in prepared.prompts]
    return Talk(prepared=prepared, record=record, voices=voices(prepared, record.id[-12:], scores))


async def _prompt_scores(prepared: Prepared) -> list[Any] | None:
    request = prepared.reading.request
    if isinstance(request, ChatRequest) or not request.echo or request.sampling.get("logprobs") is None:
        return None
    served, count, scores = prepared.served, request.sampling["logprobs"], list[Any]()
    with prepared.served.gate.admitted(prepared.caller, prepared.num_prompt):
        for prompt in prepared.prompts:
            left = seconds_left(prepared)
            call = served.worker.call(_scoring(served, prompt, count), pages=pages_for(len(prompt)))
            try:
                scores.append(await asyncio.wait_for(call, left))
            except TimeoutError:
                seconds_left(prepared)
                raise
    return scores


def _scoring(served: Served, prompt: Sequence[int], count: int) -> Callable[[], Any]:
    return lambda: served.llm.executor.score_top(prompt, count, adapter=served.adapter)


async def whole(talk: Talk, head: answers.Head, source: Source) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    said: list[list[Row]] = [voice.opening() for voice in talk.voices]
    async with aclosing(source(talk.prepared, talk.record)) as hearing:
        async for heard in hearing:
            for row in talk.rows(heard):
                said[row["index"]].append(row)
    choices = [voice.whole(rows) for voice, rows in zip(talk.voices, said, strict=True)]
    kind = "chat.completion" if isinstance(talk.prepared.reading.request, ChatRequest) else "text_completion"
    return answers.body_of(head, kind, choices, talk.usage())


async def streamed(talk: Talk, head: answers.Head, hearing: Hearing) -> Events:
    """The events of a stream. `hearing`: the source, which has taken the request."""
    chat = isinstance(talk.prepared.reading.request, ChatRequest)
    write = ChunkWriter(talk, head, "chat.completion.chunk" if chat else "text_completion")
    async with aclosing(hearing):
        opening = write(row for voice in talk.voices for row in voice.opening())
        if opening:
            yield opening
        async for heard in hearing:
            rows = talk.rows(heard)
            if rows:
                yield write(rows)
            elif not heard:
                yield COMMENT
    usage = talk.usage()
    if talk.prepared.reading.include_usage:
        yield event(answers.body_of(head, write.kind, [], usage))
    yield DONE


async def whole_response(talk: Talk, source: Source, writer: ResponseWriter) -> dict[str, Any]:
    """The same for Responses."""
    async with aclosing(source(talk.prepared, talk.record)) as hearing:
        async for heard in hearing:
            writer.take(talk.rows(heard))
    writer.end(talk.usage())
    return writer.body


async def streamed_response(talk: Talk, hearing: Hearing, writer: ResponseWriter) -> Events:
    """The same for Responses; its last event holds the whole answer, and no `[DONE]` follows."""
    async with aclosing(hearing):
        yield writer.start()
        async for heard in hearing:
            said = writer.take(talk.rows(heard))
            if said:
                yield said
            elif not heard:
                yield COMMENT
    yield writer.end(talk.usage())


class ChunkWriter:
    """Rows as events; what is heard in one step goes out in one piece."""

    def __init__(self, talk: Talk, head: answers.Head, kind: str) -> None:
        self.kind, self._head = kind, head
        self._null_usage = talk.prepared.reading.include_usage

    def __call__(self, rows: Any) -> bytes:
        return b"".join(event(self._body(row)) for row in rows)

    def _body(self, row: Row) -> dict[str, Any]:
        body = answers.body_of(self._head, self.kind, [row], None)
        if not self._null_usage:
            del body["usage"]
        return body
