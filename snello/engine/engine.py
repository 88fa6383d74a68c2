"""The engine: many requests at once on one executor, each as if it were alone.

`add` queues a request, `step` runs one batch and gives what became certain, `cancel` frees a request's pages at once.
A step is three lines: the scheduler picks rows, the executor runs them, answers draw from the logits. Because the
executor's bits do not depend on what else is in a batch, neither do anybody's tokens. Which of it runs when is
`scheduler.py`'s affair; the caller's thread does all the work, and a lock lets other threads add and cancel.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from snello.engine.adapters import NONE, Adapters
from snello.engine.cost import LearnedCost, Overrun, StepTimes
from snello.engine.generate import Answer
from snello.engine.governor import Governor, Load
from snello.engine.pages import PagePool, retention_of
from snello.engine.plan import Limits
from snello.engine.prefix import PAGE
from snello.engine.prefix_store import PrefixStore
from snello.engine.request import Chunk, SamplingParams
from snello.engine.scheduler import Counters, Scheduler
from snello.engine.sequence import Sequence as Running
from snello.engine.sequence import Step
from snello.engine.speculate import Ask, Drafter
from snello.errors import SnelloError
from snello.models.spec import Spec
from snello.models.tokenizer import Tokenizer
from snello.native.core import NotFinite

OBSERVE_EVERY = 16  # steps without a prompt: they hardly differ
PLAIN_OBSERVE_EVERY = 8  # where guesses are around, which are compared with them
PLAIN_EVERY = 64  # steps with guesses, then one without: what they are compared with
FIRST_GUESS_GB_PER_S = 15.0


class Executor(Protocol):
    """What runs steps. `NativeExecutor` is one."""

    spec: Spec
    context: int  # positions of one sequence
    chunk_rows: int  # rows of one step
    pages: PagePool
    adapters: Adapters

    def run(self, step: Step) -> np.ndarray: ...  # (outputs, V); raises NotFinite, then the copies are done
    def check(self, tokens: Sequence[int]) -> np.ndarray: ...
    def overflow(self, length: int) -> SnelloError: ...
    def bytes_per_token(self, context: int = 0) -> int: ...


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How requests share the machine.

    Attributes:
        max_num_seqs: sequences that run at the same time; others wait in order.
        step_ms: milliseconds by which prompts may lengthen a step while somebody waits for a next token.
    """

    max_num_seqs: int = 32
    step_ms: float = 50.0

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or not self.step_ms > 0:
            message = f"max_num_seqs is {self.max_num_seqs} and step_ms {self.step_ms}"
            raise SnelloError(message, "at least one sequence, and a time over 0 milliseconds")


class Event(NamedTuple):
    """A chunk and the request that it belongs to."""

    request: int
    chunk: Chunk


class Engine:
    """Requests in, chunks out.

    Args:
        executor, tokenizer: of the same model. The executor's pages may be used by sessions beside the engine.
        drafter: guesses tokens that follow; a right guess saves a step and none changes a token. The governor decides
            how many of them run.
        store: prefixes on disk, of this executor; they change no byte either. Whoever made it closes it.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        options: EngineOptions | None = None,
        drafter: Drafter | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        options = options or EngineOptions()
        most = min(options.max_num_seqs, executor.chunk_rows)
        limits = Limits(max_rows=executor.chunk_rows, max_num_seqs=most, step_ms=options.step_ms)
        self._executor, self._tokenizer, self._drafter, self._store = executor, tokenizer, drafter, store
        self.governor = Governor()
        self._scheduler = Scheduler(executor.pages, retention_of(executor.spec), limits)
        self._cost = _first_guess(executor)
        self._times = StepTimes(self._cost)  # of steps without prompts
        self._overrun = Overrun()
        self._answers: dict[int, tuple[int, Answer]] = {}  # by sequence: its request, and what it has said
        self._sequences: dict[int, list[int]] = {}  # by request
        self._boxes: dict[int, deque[Chunk]] = {}  # of requests that are streamed
        self._events: list[Event] = []  # of the others, not handed out yet
        self._lock = threading.RLock()
        self._requests = self._number = 0

    # ---- requests

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: str = "",
        adapter: str | None = None,
    ) -> int:
        """Queues a request and returns its number.

        Args:
            prompt: token ids. priority: smaller goes first. salt: computed prompts are shared only among equal ones.
            adapter: the name of the executor's adapter that answers; None: the model itself.

        Raises:
            SnelloError: empty or too long for the context, a token or an adapter that does not exist, parameters that
                do not fit.
        """
        number = NONE if adapter is None else self._executor.adapters.number(adapter)
        salt = salt if adapter is None else self._executor.adapters.salt(number, salt)
        executor, ids, seed = self._executor, self._executor.check(prompt), params.drawn_seed
        before = executor.adapters.prompt(number)
        if len(before) + len(ids) >= executor.context:
            raise executor.overflow(len(before) + len(ids))
        tokens = array("i", ids.tolist())
        room = executor.context - len(before)
        answers = [self._answer(tokens, params, seed, index, room) for index in range(params.n)]
        with self._lock:
            self._requests += 1
            self._sequences[self._requests] = []
            for answer in answers:
                self._number += 1
                self._answers[self._number] = (self._requests, answer)
                self._sequences[self._requests].append(self._number)
                self._scheduler.add(
                    Running(
                        id=self._number,
                        tokens=array("i", before) + tokens,
                        max_length=len(before) + answer.max_length,
                        priority=priority,
                        salt=salt,
                        adapter=executor.adapters.row_number(number),
                        num_virtual=len(before),
                    )
                )
            return self._requests

    def _answer(self, tokens: Sequence[int], params: SamplingParams, seed: int, index: int, room: int) -> Answer:
        """The i-th of `n` answers is drawn with seed + i. `room`: positions of prompt and answer."""
        each, decoder = (seed + index) % 2**64, self._tokenizer.stream()
        return Answer(self._executor.spec, tokens, params, decoder, context=room, seed=each, index=index)

    def cancel(self, request: int) -> None:
        """Ends a request: its pages are free when this returns. One that has ended is left alone."""
        with self._lock:
            self._boxes.pop(request, None)
            for number in list(self._sequences.get(request, ())):
                self._forget(number)
                self._scheduler.end(number)

    def step(self) -> list[Event]:
        """Runs one batch. What became certain, of all requests that are not streamed; empty when nothing is to do.

        Raises:
            SnelloError: nothing can run because sessions beside the engine hold the cache.
        """
        with self._lock:
            self._turn()
            events, self._events = self._events, []
            return events

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: str = "",
        adapter: str | None = None,
    ) -> Iterator[Chunk]:
        """Adds a request and yields its chunks, running steps as needed; others advance too. Dropping it cancels it.

        Raises:
            SnelloError: as `add`; and whatever ends the answer with an error.
        """
        with self._lock:
            request = self.add(prompt, params, priority=priority, salt=salt, adapter=adapter)
            box = self._boxes[request] = deque()
        try:
            unfinished = params.n
            while unfinished:
                with self._lock:
                    if not box and request not in self._sequences:
                        return  # cancelled from elsewhere
                    if not box:
                        self._turn()
                while box:
                    chunk = box.popleft()
                    if chunk.error is not None:
                        raise chunk.error
                    unfinished -= chunk.finish_reason is not None
                    yield chunk
        finally:
            self.cancel(request)

    def gather(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, adapter: str | None = None
    ) -> list[list[Chunk]]:
        """The chunks of whole answers to all prompts, in their order; they run together.

        Raises:
            SnelloError: as `stream`, for the first prompt that fails; none of the others is left running.
        """
        requests: list[int] = []
        answers: list[list[Chunk]] = []
        try:
            for prompt in prompts:
                with self._lock:
                    requests.append(self.add(prompt, params, adapter=adapter))
                    self._boxes[requests[-1]] = deque()
            for request in requests:
                answers.append(self._whole(request))
            return answers
        except SnelloError as error:
            place = len(answers) if len(requests) == len(prompts) else len(requests)
            raise error if len(prompts) == 1 else SnelloError(f"prompt {place}: {error.message}", error.hint) from error
        finally:
            for request in requests:
                self.cancel(request)

    def _whole(self, request: int) -> list[Chunk]:
        """Runs steps until this request is finished."""
        box = self._boxes[request]
        while request in self._sequences:
            with self._lock:
                self._turn()
        for chunk in box:
            if chunk.error is not None:
                raise chunk.error
        return list(box)

    # ---- one step

    def _turn(self) -> None:
        if self._drafter is not None:
            self._draft(self._drafter)
        if self._store is not None and self._scheduler.waiting:
            self._restore(self._store)
        started = time.perf_counter()
        step = self._scheduler.schedule(self._cost, self._overrun.ratio)
        if step:
            alone, together = self._predicted(step)
            logits, step = self._run(step)
            drawn = self._draw(step, logits)
            self._keep(step)
            self._scheduler.advance(step, drawn)
            self._end_finished(step)
            took = (time.perf_counter() - started) * 1e3
            self._observe(step, took)
            if alone and together - alone > self._scheduler.limits.step_ms / 2:
                self._overrun.observe(together - alone, took - alone)
        elif self._scheduler.has_work:
            raise SnelloError(
                f"the cache is full: sessions hold {self._executor.pages.num_held} of its pages and nothing can run",
                "close sessions that are done, or give more room with a larger context",
            )

    def _restore(self, store: PrefixStore) -> None:
        """Prefixes of those who are about to be admitted come from disk, if memory has forgotten them."""
        scheduler = self._scheduler
        for sequence in scheduler.waiting[: scheduler.limits.max_num_seqs - len(scheduler.running)]:
            store.restore(sequence, scheduler.tree, scheduler.pool, scheduler.retention, self._cost)

    def _keep(self, step: Step) -> None:
        """Whole pages go to disk, before those that are out of sight are given back."""
        if self._store is None:
            return
        for piece in step.pieces:
            sequence = piece.sequence
            if sequence.running and not self._store.computed(sequence, piece.end - piece.num_drafts):
                self._scheduler.tree.clear()

    def _run(self, step: Step) -> tuple[np.ndarray, Step]:
        """Logits, and the step that gave them: without the sequences that failed."""
        while True:
            try:
                return self._executor.run(step), step
            except NotFinite as error:
                piece = step.piece_of(error.row)
                self._fail(piece.sequence.id, error)
                step = step.without(piece)

    def _draw(self, step: Step, logits: np.ndarray) -> dict[int, list[int]]:
        """Each answer takes the tokens after its rows."""
        drawn: dict[int, list[int]] = {}
        row = 0
        for piece in step.pieces:
            if not piece.num_outputs:
                continue
            number, rows = piece.sequence.id, logits[row : row + piece.num_outputs]
            row += piece.num_outputs
            request, answer = self._answers[number]
            known = max(0, (piece.sequence.num_cached or 0) - piece.sequence.num_virtual)
            answer.num_cached = min(known, answer.num_prompt)
            guesses = piece.tokens[len(piece.tokens) - piece.num_drafts :]
            try:
                drawn[number], chunks = answer.take(rows, guesses)
                self.governor.observe(number, piece.num_drafts, len(drawn[number]) - 1)
            except SnelloError as error:
                self._fail(number, error)
                continue
            for chunk in chunks:
                self._emit(request, chunk)
        return drawn

    def _end_finished(self, step: Step) -> None:
        for piece in step.pieces:
            number = piece.sequence.id
            if number in self._answers and self._answers[number][1].finished:
                if self._drafter is not None:
                    answer = self._answers[number][1]
                    self._drafter.finished(number, answer.history, answer.num_prompt, piece.sequence.salt)
                self._forget(number)
                self._scheduler.end(number)

    def _fail(self, number: int, error: SnelloError) -> None:
        """Ends one answer with an error; what it computed is not kept."""
        request, answer = self._answers[number]
        self._emit(request, answer.fail(error))
        self._forget(number)
        self._scheduler.end(number, keep=False)

    def _forget(self, number: int) -> None:
        request, _ = self._answers.pop(number)
        self.governor.forget(number)
        if self._store is not None:
            self._store.forget(number)
        if self._drafter is not None:
            self._drafter.forget(number)
        self._sequences[request].remove(number)
        if not self._sequences[request]:
            del self._sequences[request]

    def _emit(self, request: int, chunk: Chunk) -> None:
        box = self._boxes.get(request)
        if box is None:
            self._events.append(Event(request, chunk))
        else:
            box.append(chunk)

    def _draft(self, drafter: Drafter) -> None:
        """Asks for guesses, if the governor has time for them."""
        if self.governor.overdrawn:
            return
        started = time.perf_counter()
        decoding = [sequence for sequence in self._scheduler.running if sequence.decoding]
        if not decoding or self._times.age(len(decoding)) >= PLAIN_EVERY:
            return
        asks = [self._ask(sequence) for sequence in decoding if self.governor.may_guess(sequence.id)]
        if not asks:
            return
        reads = sum(self._scheduler.retention.reads(sequence.num_computed, 1) for sequence in decoding)
        load = Load(len(decoding), reads, self._times, bool(self._scheduler.waiting))
        if not self.governor.begin(load, {ask.id: ask.remaining for ask in asks}):
            return
        for number, guesses in drafter.draft(asks, self.governor).items():
            self._scheduler.propose(number, guesses)
        self.governor.pay((time.perf_counter() - started) * 1e3)

    def _ask(self, sequence: Running) -> Ask:
        """Guesses get no page of their own, and the last token that may be said needs none after it. Who guesses sees
        what was written and said, not a prompt of the adapter's.
        """
        answer = self._answers[sequence.id][1]
        length = len(sequence.tokens)
        remaining = sequence.max_length - length
        most = min(remaining - 1, -length % PAGE)
        return Ask(sequence.id, answer.history, sequence.salt, most, remaining, answer.ends, answer.guess)

    def _observe(self, step: Step, milliseconds: float) -> None:
        """Learns from every step with prompts or guesses, and now and then from one without.

        The time is that of a whole step, since a saved one saves what scheduling and drawing take as well; of a small
        model that is as much as its rows.
        """
        rows, number = step.num_rows, self._scheduler.counters.steps
        if self._drafter is not None:
            self.governor.earn(milliseconds)
        if rows == len(step.pieces) and not self._is_due(rows, number):
            return
        retention = self._scheduler.retention
        reads = sum(retention.reads(piece.start, len(piece.tokens)) for piece in step.pieces)
        if step.has_prompts or number % OBSERVE_EVERY == 0:
            self._cost.observe(rows, reads, milliseconds)
        if self._drafter is None:
            return
        if not step.has_prompts:
            self._times.observe(rows, reads, milliseconds)
        if guesses := step.num_drafts:
            own = sum(retention.reads(piece.end - piece.num_drafts, piece.num_drafts) for piece in step.pieces)
            self.governor.ran(self._times, rows, reads, guesses, own)

    def _predicted(self, step: Step) -> tuple[float, float]:
        """Milliseconds of a step's next tokens alone, 0 without any, and of all its rows; 0 without prompts."""
        if not step.has_prompts:
            return 0.0, 0.0
        retention = self._scheduler.retention
        reads = {piece.sequence.id: retention.reads(piece.start, len(piece.tokens)) for piece in step.pieces}
        decoding = [piece.sequence.id for piece in step.pieces if piece.sequence.decoding]
        alone = self._cost(len(decoding), sum(reads[number] for number in decoding)) if decoding else 0.0
        return alone, self._cost(step.num_rows, sum(reads.values()))

    def _is_due(self, rows: int, number: int) -> bool:
        """Whether to learn from a step with next tokens alone."""
        if self._drafter is None or self.governor.overdrawn:
            return number % OBSERVE_EVERY == 0
        return number % PLAIN_OBSERVE_EVERY == 0 or self._times.age(rows) >= PLAIN_EVERY

    # ---- facts

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def counters(self) -> Counters:
        """Since the start."""
        return self._scheduler.counters

    def clear_cache(self) -> None:
        """Forgets all computed prompts that nobody uses; those in use are not shared any more."""
        with self._lock:
            self._scheduler.tree.clear()


def _first_guess(executor: Executor) -> LearnedCost:
    """Before anything was timed: the bytes of a token at a modest bandwidth, and a prompt row an eighth of that."""
    token = executor.bytes_per_token() / FIRST_GUESS_GB_PER_S / 1e6
    read = (executor.bytes_per_token(1) - executor.bytes_per_token()) / FIRST_GUESS_GB_PER_S / 1e6
    return LearnedCost(token, token / 8, read)
