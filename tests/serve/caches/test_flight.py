"""Requests that share a generation: all hear everything, whoever leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from snello.errors import SnelloError
from snello.serve.caches.flight import Flights


class Source:
    """A generation that says its numbers when it is let, and knows how it ended."""

    def __init__(self, count: int = 5, error: Exception | None = None) -> None:
        self.count, self.error = count, error
        self.begun = self.closed = 0
        self.ready = asyncio.Semaphore(0)

    def __call__(self) -> AsyncIterator[int]:
        self.begun += 1
        return self._say()

    async def _say(self) -> AsyncIterator[int]:
        try:
            for number in range(self.count):
                await self.ready.acquire()
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1

    def let(self, count: int) -> None:
        for _ in range(count):
            self.ready.release()


async def turn() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def hear(flights: Flights[int], key: object, source: Callable[[], AsyncIterator[int]], heard: list[int]) -> None:
    async with flights.join(key, source) as items:
        async for item in items:
            heard.append(item)


def flying(scenario: Callable[..., Any], **names: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(**names), 5))


def test_a_follower_hears_what_was_said_and_goes_on() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        first, second, third = [], [], []
        tasks = [asyncio.create_task(hear(flights, "k", source, first))]
        source.let(3)
        await turn()
        tasks.append(asyncio.create_task(hear(flights, "k", source, second)))
        await turn()
        assert first == second == [0, 1, 2]
        source.let(2)
        tasks.append(asyncio.create_task(hear(flights, "k", source, third)))
        await asyncio.gather(*tasks)
        assert first == second == third == [0, 1, 2, 3, 4]
        assert source.begun == source.closed == 1 and len(flights) == 0
        assert (flights.counters.begun, flights.counters.joined, flights.counters.cancelled) == (1, 2, 0)

    flying(scenario)


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_who_leaves_takes_nobody_along(leaver: int) -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        heard: list[list[int]] = [[], [], []]
        tasks = [asyncio.create_task(hear(flights, "k", source, each)) for each in heard]
        source.let(2)
        await turn()
        tasks[leaver].cancel()
        await turn()
        assert tasks[leaver].cancelled() and source.closed == 0
        source.let(3)
        await asyncio.gather(*(task for task in tasks if task is not tasks[leaver]))
        assert [each for each in heard if each is not heard[leaver]] == [[0, 1, 2, 3, 4]] * 2
        assert source.begun == source.closed == 1 and flights.counters.cancelled == 0

    flying(scenario)


def test_the_last_one_to_leave_ends_the_generation() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        tasks = [asyncio.create_task(hear(flights, "k", source, [])) for _ in range(3)]
        source.let(1)
        await turn()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert source.closed == 1 and len(flights) == 0 and flights.counters.cancelled == 1
        heard: list[int] = []
        source.let(9)
        await hear(flights, "k", source, heard)  # whoever comes then begins anew
        assert source.begun == 2 and heard == [0, 1, 2, 3, 4]

    flying(scenario)


def test_who_comes_while_a_dying_generation_closes_begins_anew() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        closing = asyncio.Event()

        async def slow() -> AsyncIterator[int]:
            try:
                await asyncio.sleep(9)
                yield 1
            finally:
                await closing.wait()

        task = asyncio.create_task(hear(flights, "k", slow, []))
        await turn()
        task.cancel()
        await turn()
        heard: list[int] = []
        source.let(9)
        await hear(flights, "k", source, heard)
        assert heard == [0, 1, 2, 3, 4]
        closing.set()
        await asyncio.gather(task, return_exceptions=True)

    flying(scenario)


def test_an_error_reaches_everybody_and_no_latecomer() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source(2, SnelloError("it broke", "mend it"))
        heard: list[list[int]] = [[], []]
        tasks = [asyncio.create_task(hear(flights, "k", source, each)) for each in heard]
        source.let(2)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in ended] == ["it broke"] * 2 and heard == [[0, 1]] * 2
        source.error = None
        source.let(2)
        await hear(flights, "k", source, heard[0])
        assert source.begun == 2 and heard[0] == [0, 1, 0, 1]

    flying(scenario)


def test_a_generation_that_cannot_begin_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        flights: Flights[int] = Flights()

        def broken() -> AsyncIterator[int]:
            raise SnelloError("too long", "shorten it")

        with pytest.raises(SnelloError, match="too long"):
            await hear(flights, "k", broken, [])
        assert len(flights) == 0 and flights.counters.begun == 0

    flying(scenario)


def test_other_keys_and_no_key_share_nothing() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        source.let(99)
        await asyncio.gather(*(hear(flights, key, source, []) for key in ("a", "b", None, None)))
        assert source.begun == 4 and flights.counters.joined == 0

    flying(scenario)


def test_a_slow_listener_holds_nobody_up() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source()
        source.let(99)
        heard: list[int] = []
        async with flights.join("k", source) as slow:
            assert not slow.shared
            await hear(flights, "k", source, heard)
            assert heard == [0, 1, 2, 3, 4]
            assert [item async for item in slow] == heard
        assert source.begun == 1

    flying(scenario)


def test_hundreds_come_and_go() -> None:
    async def scenario() -> None:
        flights, source = Flights[int](), Source(40)

        async def some(number: int) -> None:
            heard: list[int] = []
            task = asyncio.create_task(hear(flights, number % 3, source, heard))
            for _ in range(number % 50):
                await asyncio.sleep(0)
            source.let(2)
            if number % 4 == 0:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert heard == list(range(len(heard))) and (number % 4 == 0 or len(heard) == 40)

        source.let(100)
        tasks = [asyncio.create_task(some(number)) for number in range(300)]
        while not all(task.done() for task in tasks):
            source.let(1)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert len(flights) == 0 and source.begun == source.closed

    flying(scenario)
