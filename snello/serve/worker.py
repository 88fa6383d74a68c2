"""The thread that steps one model's engine, and the bridge between it and the event loop.

The loop never waits for a step: what it asks (add, cancel, a function) goes into a list that the thread reads between
steps, so a cancelled request's pages are free before the next step. All that a step says goes back in one hand-over,
however many streams it is for. Several models take turns at the cores, step by step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from snello.engine.engine import Engine, EngineOptions
from snello.engine.llm import LLM
from snello.engine.request import Chunk, SamplingParams
from snello.errors import SnelloError
from snello.serve.errors import RequestError, request_error

Result = TypeVar("Result")
Heard = tuple[int, Chunk]  # which prompt of a ticket, what was said
JOIN_SECONDS = 10.0
log = logging.getLogger("snello.serve")


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request in the engine: one prompt or several, each with its settings. Belongs to the loop.

    Attributes:
        salt: computed prompts are shared only among equal ones. adapter: that answers; None: the model itself.
    """

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    salt: str = ""
    adapter: str | None = None
    priority: int = 0
    numbers: dict[int, int] = field(default_factory=dict)  # number in the engine -> prompt; the thread's
    cancelled: bool = False
    _heard: list[Heard] = field(default_factory=list)
    _error: RequestError | None = None
    _admitted: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def admitted(self, seconds: float) -> None:
        """Waits until the engine has taken it, at most so long.

        Raises:
            RequestError: it has not.
        """
        if not self._admitted and self._error is None:
            await self._wait(seconds)
        if not self._admitted:  # what failed later is told in its turn, after what was said before
            self._raise()

    async def heard(self, seconds: float) -> list[Heard]:
        """What was said since the last call; empty when nothing was for so long.

        Raises:
            RequestError: the request has failed as a whole.
        """
        if not self._heard and self._error is None:
            await self._wait(seconds)
        if not self._heard:
            self._raise()
        heard, self._heard = self._heard, []
        return heard

    async def _wait(self, seconds: float) -> None:
        """For news. One timer and no task: this is called for every token of every stream."""
        self._news.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def tell(self, news: Heard | RequestError | None) -> None:
        """On the loop. None: it was admitted."""
        if news is None:
            self._admitted = True
        elif isinstance(news, RequestError):
            self._error = news
        else:
            self._heard.append(news)
        self._news.set()


class Turns:
    """Whose step is next, first come first served: two programs at once would fight for the same cores."""

    def __init__(self) -> None:
        self._lock, self._waiting, self._taken = threading.Lock(), deque[threading.Event](), False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


@dataclass(eq=False)
class _Call:
    """A function to be run between steps. `pages`: so many must be free for it."""

    function: Callable[[], Any]
    pages: int
    future: asyncio.Future[Any]


class Worker:
    """One model that answers.

    Args:
        llm: used by this thread alone from now on.
        turns: shared by all workers of a process.
    """

    def __init__(self, llm: LLM, options: EngineOptions, turns: Turns, name: str = "") -> None:
        self.llm, self._options, self._turns = llm, options, turns
        self._engine = self._new_engine()
        self._tickets: dict[int, Ticket] = {}  # by number in the engine
        self._asked: deque[Callable[[], None]] = deque()
        self._calls: deque[_Call] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._said: list[tuple[Ticket, Heard | RequestError | None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"snello engine {name}", daemon=True)
        self.tokens = 0  # drawn since the start
        self.failures = 0  # bugs that ended a step
        self.step_seconds = 0.0  # in steps, since the start

    def _new_engine(self) -> Engine:
        llm = self.llm
        return Engine(llm.executor, llm.tokenizer, self._options, llm.drafter, llm.store)

    @property
    def engine(self) -> Engine:
        """For counts; never to be stepped from elsewhere."""
        return self._engine

    # ---- from the loop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        self._ask(lambda: self._add(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Its pages are free before the next step. One that has ended is left alone."""
        if not ticket.cancelled:
            ticket.cancelled = True
            self._ask(lambda: self._drop(ticket))

    def call(self, function: Callable[[], Result], *, pages: int = 0) -> asyncio.Future[Result]:
        """Runs a function between steps, as soon as so many pages are free; cancel the future to give it up."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._ask(lambda: self._calls.append(_Call(function, pages, future)))
        return future

    def fail_all(self, error: RequestError) -> None:
        """Ends everything that runs or waits, with this error."""
        self._ask(lambda: self._fail_all(error))

    def stop(self) -> None:
        """Ends the thread after the step under way."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _ask(self, what: Callable[[], None]) -> None:
        self._asked.append(what)
        self._wake.set()

    # ---- in the thread

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            while self._asked:
                self._do(self._asked.popleft())
            busy = self._calls_run()
            if self._engine.has_work:
                self._step()
                busy = True
            self._hand_over()
            if not busy and not self._asked:
                self._wake.wait()

    def _do(self, what: Callable[[], None]) -> None:
        """A bug in one request's business ends no thread that all others wait for."""
        try:
            what()
        except Exception as error:
            self._start_anew(error)

    def _add(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            for place, (prompt, params) in enumerate(zip(ticket.prompts, ticket.params, strict=True)):
                number = self._engine.add(
                    prompt, params, priority=ticket.priority, salt=ticket.salt, adapter=ticket.adapter
                )
                ticket.numbers[number] = place
                self._tickets[number] = ticket
            self._said.append((ticket, None))
        except Exception as error:
            self._drop(ticket)
            self._said.append((ticket, self._as_request_error(error)))

    def _drop(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            self._tickets.pop(number, None)
            self._engine.cancel(number)
        ticket.numbers.clear()  # a new engine gives them to others

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            with self._turns:
                events = self._engine.step()
        except Exception as error:
            self._start_anew(error)
            return
        self.step_seconds += time.perf_counter() - started
        for number, chunk in events:
            ticket = self._tickets.get(number)
            if ticket is None:
                continue  # another of its answers has failed in this step
            self.tokens += chunk.token_id is not None
            if chunk.error is not None:
                self._drop(ticket)
                self._said.append((ticket, request_error(chunk.error)))
            else:
                self._said.append((ticket, (ticket.numbers[number], chunk)))

    def _start_anew(self, error: Exception) -> None:
        """A step failed as no step should: what was in it fails, and what comes next meets a clean engine."""
        self.failures += 1
        log.error("a step failed; its requests end", exc_info=error)
        told = self._as_request_error(error)
        try:
            self._fail_all(told)
            self._engine.clear_cache()
        except Exception as another:  # the engine is left as it is: nothing of it is used again but the pages it freed
            log.error("the engine could not be cleared", exc_info=another)
            self._said += [(ticket, told) for ticket in set(self._tickets.values())]
            self._tickets.clear()
        self._engine = self._new_engine()

    def _fail_all(self, error: RequestError) -> None:
        for ticket in set(self._tickets.values()):
            self._said.append((ticket, error))
            self._drop(ticket)
        while self._calls:
            future = self._calls.popleft().future
            self._to_loop(lambda future=future: _settle(future, None, error))  # type: ignore[misc]

    def _as_request_error(self, error: Exception) -> RequestError:
        if isinstance(error, SnelloError):
            return request_error(error)
        return RequestError("something went wrong here; the log has the details", code="internal_error", status=500)

    def _calls_run(self) -> bool:
        """Runs the first function that waits, if there is room for it."""
        while self._calls and self._calls[0].future.cancelled():
            self._calls.popleft()
        if not self._calls:
            return False
        call = self._calls[0]
        if call.pages > self.llm.executor.pages.num_free and self._engine.has_work:
            return False
        self._calls.popleft()
        result, failure = None, None
        try:
            with self._turns:
                result = call.function()
        except Exception as error:
            if not isinstance(error, SnelloError):
                log.error("a request failed", exc_info=error)
            failure = self._as_request_error(error)
        self._to_loop(lambda: _settle(call.future, result, failure))
        return True

    def _hand_over(self) -> None:
        """Everything that was said since the last time, in one call of the loop."""
        if self._said:
            said, self._said = self._said, []
            self._to_loop(lambda: _tell(said))

    def _to_loop(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what)


def _tell(said: list[tuple[Ticket, Heard | RequestError | None]]) -> None:
    for ticket, news in said:
        ticket.tell(news)


def _settle(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
