"""The caches as a server sees them: one call per request, chunks come back, and where they come from.

The order is that of certainty: the exact answer, then, where it serves at all, the answer to a similar question, then a
generation that runs, then one that is begun. Whoever generates a whole answer leaves it for the others. A hit that is
audited is given at once; what the model says to it comes later, and nobody waits for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from snello.engine.request import Chunk
from snello.errors import SnelloError
from snello.serve.caches.exact import ExactAnswers, complete, from_bytes, to_bytes
from snello.serve.caches.flight import Flights
from snello.serve.caches.identity import Asked, ModelIdentity, key_of
from snello.serve.caches.lookup import Lookups
from snello.serve.caches.similar import Found, namespace_of, question_of, same_answer

AUDIT_SECONDS = 600.0
LOG = logging.getLogger("snello.cache")
Begin = Callable[[], AsyncIterator[Chunk]]
Judge = Callable[[str, str], bool]  # (answer that was kept, answer that was generated) -> whether the first would do


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Chunks of an answer, and where they come from: "computed", "flight", "exact", or a similar question's header."""

    source: str
    chunks: AsyncIterator[Chunk]


class _Place(NamedTuple):
    """Where a question belongs among similar ones."""

    namespace: bytes
    question: str


class AnswerCaches:
    """All caches of answers of one model. Of one event loop.

    Args:
        exact, similar: what is not given is not done; similar questions need exact answers, which hold theirs.
        judge: of audited hits.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        exact: ExactAnswers | None = None,
        similar: Lookups | None = None,
        judge: Judge = same_answer,
    ) -> None:
        assert exact is not None or similar is None, "similar questions need exact answers"
        self.identity, self.exact, self.similar, self._judge = identity, exact, similar, judge
        self.flights: Flights[Chunk] = Flights()
        self._audits: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def answer(
        self,
        asked: Asked,
        begin: Begin,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        read: bool = True,
        keep: bool = True,
    ) -> AsyncIterator[Reply]:
        """The answer to a request. Leaving before its end gives up only this listener's part.

        Args:
            begin: starts a generation; its iterator is closed when nobody listens any more.
            messages: of a chat, for similar questions. read, keep: False where the client said no-cache, or no-store.

        Raises (while the chunks come):
            whatever the generation raises.
        """
        if not asked.deterministic:
            async with self.flights.join(None, begin) as items:
                yield Reply(source="computed", chunks=items)
            return
        key = key_of(self.identity, asked)
        place = self._place(asked, messages)
        stored, found = await self._known(key, place) if read else (None, None)
        if stored is not None:
            if found is not None and found.audit:
                self._audit(stored, self._heard(begin, asked, key, place, keep))
            source = found.header if found else "exact"
            yield Reply(source=source, chunks=_replay(stored, len(asked.tokens)))
            return
        flight = key if keep and read else None  # None: a generation of its own
        async with self.flights.join(flight, lambda: self._heard(begin, asked, key, place, keep)) as items:
            yield Reply(source="flight" if items.shared else "computed", chunks=items)

    def _place(self, asked: Asked, messages: Sequence[Mapping[str, Any]]) -> _Place | None:
        split = question_of(messages) if self.similar is not None else None
        namespace = namespace_of(self.identity, asked, split[0]) if split else None
        return _Place(namespace, split[1]) if split and namespace else None

    async def _known(self, key: bytes, place: _Place | None) -> tuple[bytes | None, Found | None]:
        """An answer that is kept, and the similar question that it was given to, if it was another."""
        if self.exact is None:
            return None, None
        stored = self.exact.get(key)
        if stored is not None or place is None or self.similar is None:
            return stored, None
        found = await self.similar.find(*place)
        if found is None:
            return None, None
        stored = self.exact.get(found.key)
        if stored is None:  # the exact cache let it go
            self.similar.forget(place.namespace, found.question)
            return None, None
        return stored, found

    async def _heard(
        self, begin: Begin, asked: Asked, key: bytes, place: _Place | None, keep: bool
    ) -> AsyncGenerator[Chunk]:
        """A generation, listened to: whole answers are kept."""
        said: list[Chunk] = []
        source = begin()
        try:
            async for chunk in source:
                said.append(chunk)
                yield chunk
        finally:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()
        if self.exact is None or not keep or not complete(said, asked.params.n):
            return
        await asyncio.to_thread(self.exact.put, key, to_bytes(said))
        if place is not None and self.similar is not None:
            self.similar.keep(*place, key, finish_reason=said[-1].finish_reason)

    # ---- the audit

    def _audit(self, given: bytes, heard: AsyncGenerator[Chunk]) -> None:
        """Judges an answer that was given to a similar question; one at a time, for it takes a place in the engine."""
        assert self.similar is not None
        if self._audits:
            self.similar.similar.counters.unaudited += 1
            return
        task = asyncio.create_task(self._compare(given, heard))
        self._audits.add(task)
        task.add_done_callback(self._audits.discard)

    async def _compare(self, given: bytes, heard: AsyncGenerator[Chunk]) -> None:
        assert self.similar is not None
        try:
            async with asyncio.timeout(AUDIT_SECONDS), aclosing(heard):
                said = [chunk async for chunk in heard]
        except (SnelloError, TimeoutError):  # no room in the engine, or the server ends
            said = []
        except Exception:
            LOG.exception("an answer to a similar question could not be audited")
            said = []
        if complete(said, 1):
            self.similar.judged(right=self._judge(_text(from_bytes(given)), _text(said)))
        else:
            self.similar.similar.counters.unaudited += 1

    def counters(self) -> dict[str, float]:
        """All counts by name, for a server's metrics."""
        parts: dict[str, object] = {"flight": self.flights.counters}
        if self.exact is not None:
            parts["exact"] = self.exact.counters
        if self.similar is not None:
            parts["similar"] = self.similar.similar.counters
        return {f"{part}_{name}": value for part, each in parts.items() for name, value in vars(each).items()}

    def close(self) -> None:
        """Closes the exact answers. Closing twice is harmless."""
        if self.exact is not None:
            self.exact.close()


async def _replay(stored: bytes, num_prompt: int) -> AsyncIterator[Chunk]:
    """What was said, as the answer to a prompt of so many tokens: a similar question has another number."""
    for chunk in from_bytes(stored):
        usage = chunk.usage and replace(chunk.usage, prompt_tokens=num_prompt, cached_tokens=num_prompt)
        yield replace(chunk, usage=usage)


def _text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
