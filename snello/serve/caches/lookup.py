"""Similar questions off the hot path: one thread embeds and compares, and no request waits for it long.

An encoder takes milliseconds a question, and a busy server has many. So only a few may wait for the thread, a request
gives up its lookup after a bounded time and is computed as if there were no such cache, and what is learned or judged
is done after its answer was given. Whatever fails here costs a hit, never an answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from snello.serve.caches.similar import Found, SimilarAnswers

Result = TypeVar("Result")
MOST_WAITING = 16
LOOKUP_SECONDS = 0.25
LOG = logging.getLogger("snello.cache")


class Lookups:
    """Similar answers as a server asks for them. All models of a server may share one.

    Args:
        most_waiting: lookups and new questions that may wait for the thread; more are left out.
        seconds: that one request waits. close: what to close with it, its encoder.
    """

    def __init__(
        self,
        similar: SimilarAnswers,
        *,
        most_waiting: int = MOST_WAITING,
        seconds: float = LOOKUP_SECONDS,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.similar, self._seconds, self._close = similar, seconds, close
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="similar")
        self._room = threading.Semaphore(most_waiting)

    async def find(self, namespace: bytes, question: str) -> Found | None:
        """The answer of the nearest question, if all gates let it through in time."""
        future = self._submit(lambda: self.similar.find(namespace, question))
        if future is None:
            return None
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            self.similar.counters.late += 1
            return None

    def keep(self, namespace: bytes, question: str, key: bytes, *, finish_reason: str | None) -> None:
        """Learns a question, soon. Whoever looks up after this call finds it."""
        self._submit(lambda: self.similar.keep(namespace, question, key, finish_reason=finish_reason))

    def forget(self, namespace: bytes, question: str) -> None:
        """Its answer is gone."""
        self._submit(lambda: self.similar.forget(namespace, question))

    def judged(self, *, right: bool) -> None:
        """An audited hit was right or wrong. Never left out: a demotion must not wait for a quiet hour."""
        self._thread.submit(self._guarded, lambda: self.similar.judged(right=right))

    def _submit(self, work: Callable[[], Result]) -> Future[Result | None] | None:
        if not self._room.acquire(blocking=False):
            self.similar.counters.busy += 1
            return None
        future = self._thread.submit(self._guarded, work)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _guarded(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Exception:  # an embedder's fault is not the client's
            self.similar.counters.failed += 1
            LOG.exception("a similar question could not be looked up or learned")
            return None

    def close(self) -> None:
        """Waits for what the thread does now. Closing twice is harmless."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._close is not None:
            self._close()
            self._close = None
