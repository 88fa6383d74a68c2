"""Lookups off the hot path: a slow, busy or broken embedder costs hits, and nobody waits for it long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from snello.serve.caches.embed import NgramEmbedder, Vectors
from snello.serve.caches.lookup import Lookups
from tests.serve.caches.test_similar import ALSO_PARIS, PARIS, SPACE, cache


class Slow(NgramEmbedder):
    """Embeds when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.broken = False

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.gate.wait(10)
        if self.broken:
            raise ValueError("no such thing")
        return super().embed(texts)


def test_what_was_learned_is_found_by_whoever_comes_next() -> None:
    async def scenario() -> None:
        lookups = Lookups(cache(), seconds=10)
        lookups.keep(SPACE, PARIS, b"k", finish_reason="stop")
        found = await lookups.find(SPACE, ALSO_PARIS)
        assert found is not None and found.key == b"k"
        lookups.forget(SPACE, PARIS)
        assert await lookups.find(SPACE, ALSO_PARIS) is None
        lookups.close()
        lookups.close()

    asyncio.run(scenario())


def test_nobody_waits_for_a_slow_embedder() -> None:
    async def scenario() -> None:
        embedder = Slow()
        similar = cache(embedder=embedder)
        lookups = Lookups(similar, most_waiting=3, seconds=0.05)
        started = time.monotonic()
        assert await asyncio.gather(*(lookups.find(SPACE, f"{PARIS} {n}") for n in range(10))) == [None] * 10
        assert time.monotonic() - started < 5
        assert (similar.counters.late, similar.counters.busy) == (3, 7)
        embedder.gate.set()
        while similar.counters.asked == 0 or not lookups._room.acquire(blocking=False):
            await asyncio.sleep(0.005)
        lookups._room.release()
        lookups.close()
        assert similar.counters.asked == 1, "who gave up before its turn is not looked up at all"

    asyncio.run(scenario())


def test_a_broken_embedder_is_no_error_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        embedder = Slow()
        embedder.broken = True
        embedder.gate.set()
        similar = cache(embedder=embedder)
        lookups = Lookups(similar, seconds=10)
        lookups.keep(SPACE, PARIS, b"k", finish_reason="stop")
        assert await lookups.find(SPACE, ALSO_PARIS) is None and similar.counters.failed == 2
        lookups.close()

    asyncio.run(scenario())
    assert "could not be looked up" in caplog.text


def test_a_verdict_is_never_left_out() -> None:
    similar = cache()
    lookups = Lookups(similar, most_waiting=0, seconds=0.1)
    for _ in range(30):
        lookups.judged(right=False)
    lookups._thread.shutdown(wait=True)
    assert similar.counters.audited == 30 and not similar.serves
    assert asyncio.run(lookups.find(SPACE, PARIS)) is None and similar.counters.busy == 1
    lookups.close()


def test_its_encoder_is_closed_with_it() -> None:
    closed: list[int] = []
    lookups = Lookups(cache(), close=lambda: closed.append(1))
    lookups.close()
    lookups.close()
    assert closed == [1]
