"""Identical requests in flight share one generation.

A generation belongs to its flight, not to the request that began it: whoever comes while it runs hears what was said so
far and goes on with it, at its own pace, and whoever leaves leaves alone. When the last one has left, the generation is
cancelled. So no leader exists whose disconnect could kill the others. Only deterministic requests may share a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class FlightCounters:
    """Since the start. `begun`: generations; `joined`: requests that needed none of their own; `cancelled`: generations
    that everybody left."""

    begun: int = 0
    joined: int = 0
    cancelled: int = 0


class _Flight(Generic[T]):
    """One generation: what it said so far, and who listens."""

    def __init__(self, source: AsyncIterator[T]) -> None:
        self.said: list[T] = []
        self.done = False
        self.error: BaseException | None = None
        self.listeners = 0
        self.news = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(source))

    async def _run(self, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                self.said.append(item)
                self._tell()
        except asyncio.CancelledError as error:
            self.error = error
            raise
        except Exception as error:  # everybody who listens gets it
            self.error = error
        finally:
            self.done = True
            self._tell()
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()

    def _tell(self) -> None:
        """Wakes all who wait now; who comes later waits for the next one."""
        news, self.news = self.news, asyncio.Event()
        news.set()


class Listener(Generic[T]):
    """One request's place in a flight: an asynchronous iterator, to be used as a context manager.

    Raises (while iterating):
        whatever the generation raises; each listener gets it.
    """

    def __init__(self, flights: Flights[T], key: Hashable | None, begin: Callable[[], AsyncIterator[T]]) -> None:
        self._flights, self._key, self._begin = flights, key, begin
        self._flight: _Flight[T] | None = None
        self._at = 0
        self.shared = False  # whether somebody else had begun it

    async def __aenter__(self) -> Listener[T]:
        self._flight, self.shared = self._flights._board(self._key, self._begin)
        return self

    def __aiter__(self) -> Listener[T]:
        return self

    async def __anext__(self) -> T:
        flight = self._flight
        assert flight is not None, "use it as a context manager"
        while self._at == len(flight.said):
            if flight.done:
                if flight.error is not None:
                    raise flight.error
                raise StopAsyncIteration
            await flight.news.wait()
        self._at += 1
        return flight.said[self._at - 1]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            await self._flights._leave(self._key, flight)


class Flights(Generic[T]):
    """All generations that can be joined, by the key of their requests. Of one event loop."""

    def __init__(self) -> None:
        self.counters = FlightCounters()
        self._flights: dict[Hashable, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: Hashable | None, begin: Callable[[], AsyncIterator[T]]) -> Listener[T]:
        """`async with flights.join(key, begin) as items: async for item in items: ...`

        Args:
            key: equal only where the answers are (`identity.key_of`); None: a generation of its own.
            begin: starts a generation. Its iterator is closed when it has ended or everybody has left.
        """
        return Listener(self, key, begin)

    def _board(self, key: Hashable | None, begin: Callable[[], AsyncIterator[T]]) -> tuple[_Flight[T], bool]:
        flight = None if key is None else self._flights.get(key)
        shared = flight is not None and flight.error is None
        if flight is None or flight.error is not None:
            flight = _Flight(begin())
            self.counters.begun += 1
            if key is not None:
                self._flights[key] = flight
                flight.task.add_done_callback(lambda _: self._land(key, flight))
        else:
            self.counters.joined += 1
        flight.listeners += 1
        return flight, shared

    def _land(self, key: Hashable, flight: _Flight[T]) -> None:
        """What has ended is joined by nobody any more."""
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _leave(self, key: Hashable | None, flight: _Flight[T]) -> None:
        flight.listeners -= 1
        if flight.listeners or flight.done:
            return
        if key is not None:
            self._land(key, flight)
        self.counters.cancelled += 1
        flight.task.cancel()
        await asyncio.wait([flight.task])
