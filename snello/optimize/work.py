"""Doing units of work: in a thread of their own so that progress can be told, journaled, interruptible in between.

The first Ctrl-C asks: the unit under way is finished and written down, then the run ends resumable. The second, and a
SIGTERM, which is seldom followed by patience, stop at once; what was written is still whole.
"""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from snello.optimize.events import Event, Progress, Warned
from snello.optimize.journal import Journal, Unit, unit_key

TELL_SECONDS = 0.1  # progress is told at most this often
LOOK_SECONDS = 0.2  # how soon a wish to stop is answered
LEAVE_SECONDS = 3.0  # what a unit that is abandoned gets to leave its work
STOPPING = "stopping: what is under way is finished and written down first"

Report = Callable[[str, int, int, str], None]  # activity, done, total, unit
Answer = tuple[Any, Mapping[str, np.ndarray]]
Function = Callable[[Report], Answer]


class RunStopped(Exception):
    """Asked to stop, and everything that was finished is in the journal."""


class Abandoned(BaseException):
    """Raised inside a unit whose run has ended, by its next report of progress."""


class Interrupts:
    """Turns the first Ctrl-C into a wish; only in the main thread, where Python allows it.

    A demand that comes while a unit starts, or while one of its events is in the reader's hands, is held until that is
    over: raised there, it would leave the unit at work. A second one does not wait.
    """

    def __init__(self) -> None:
        self.wished = self.answered = False
        self._held = self._demanded = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._wish, signal.SIGTERM: self._demand}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def _wish(self, number: int, frame: FrameType | None) -> None:
        if self.wished:
            self._demand(number, frame)
        self.wished = True

    def _demand(self, number: int, frame: FrameType | None) -> None:
        if not self._held or self._demanded:
            raise KeyboardInterrupt
        self._demanded = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Demands come at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._demanded:
            raise KeyboardInterrupt

    def unanswered(self) -> bool:
        """Whether a wish was made that nobody has been told of yet; asking answers it."""
        answered, self.answered = self.answered, self.wished
        return self.wished and not answered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@dataclass
class Worker:
    """Runs units, adds up what they took, and keeps the time budget."""

    journal: Journal
    interrupts: Interrupts
    budget_seconds: float
    common: Mapping[str, Any]  # inputs of every unit: seed, version
    finished_seconds: float = 0.0
    abandoned: bool = False  # a unit would not stop: its thread is still at work
    _started: float | None = None

    @property
    def used_seconds(self) -> float:
        running = time.monotonic() - self._started if self._started is not None else 0.0
        return self.finished_seconds + running

    @property
    def left_seconds(self) -> float:
        return self.budget_seconds - self.used_seconds

    def known(self, name: str, inputs: Mapping[str, Any]) -> Unit | None:
        return self.journal.recall(unit_key(name, {**self.common, **inputs}))

    def unit(
        self, stage: str, name: str, inputs: Mapping[str, Any], function: Function
    ) -> Generator[Event, None, Unit]:
        """The unit from the journal, or done now and journaled."""
        key = unit_key(name, {**self.common, **inputs})
        unit = self.journal.recall(key)
        if unit is None:
            self.check()
            self._started = time.monotonic()
            try:
                value, arrays = yield from self._threaded(stage, function)
                unit = Unit(name, value, time.monotonic() - self._started, arrays)
                self.journal.keep(key, unit)
            finally:
                self._started = None
            unit = self.journal.recall(key) or unit  # exactly what a resumed run would see
        self.finished_seconds += unit.seconds
        self.check()
        return unit

    def check(self) -> None:
        if self.interrupts.wished:
            raise RunStopped

    def _threaded(self, stage: str, function: Function) -> Generator[Event, None, Answer]:
        """Runs `function` beside, yielding its progress."""
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        last, leave = -math.inf, threading.Event()

        def report(activity: str, done: int, total: int, unit: str) -> None:
            nonlocal last
            if leave.is_set():
                raise Abandoned
            now = time.monotonic()
            if now - last >= TELL_SECONDS or done == total:
                last = now
                told.put(("progress", (activity, done, total, unit)))

        def work() -> None:
            try:
                told.put(("answer", function(report)))
            except BaseException as error:
                told.put(("error", error))

        thread = threading.Thread(target=work, daemon=True, name=f"snello {stage}")
        try:
            with self.interrupts.held():
                thread.start()
            return (yield from self._listen(stage, told))
        finally:
            leave.set()
            thread.join(LEAVE_SECONDS)
            self.abandoned = thread.is_alive()

    def _listen(self, stage: str, told: queue.SimpleQueue[Any]) -> Generator[Event, None, Answer]:
        """What the thread tells, until its answer or its error."""
        while True:
            if self.interrupts.unanswered():
                with self.interrupts.held():
                    yield Warned(message=STOPPING, hint="Ctrl-C again stops at once")
            try:
                kind, content = told.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if kind == "answer":
                return content  # type: ignore[no-any-return]
            if kind == "error":
                raise content
            activity, done, total, unit = content
            with self.interrupts.held():
                yield Progress(
                    stage=stage, activity=activity, done=done, total=total, unit=unit, used_seconds=self.used_seconds
                )
