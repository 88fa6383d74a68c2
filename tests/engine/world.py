"""A world for the scheduler without a model: memory that remembers what was written, and a check after every step.

What a position holds is a digest of salt and all tokens up to it, so a page that was shared, copied, evicted or written
wrongly is seen by the next row that looks at it. What follows a prefix is a function of its digest, so every answer is
known before it is scheduled.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter

from snello.engine.pages import GONE, STATE_ROWS, PagePool, Retention
from snello.engine.plan import Limits
from snello.engine.prefix import PAGE
from snello.engine.scheduler import Scheduler
from snello.engine.sequence import Piece, Sequence, Step

VOCABULARY = 7


def cost(rows: int, reads: int) -> float:
    """Milliseconds in this world."""
    return 4 + 0.5 * rows + 0.002 * reads


def digests(tokens: array[int] | list[int], salt: str) -> list[int]:
    """Of every position: all that it depends on."""
    state, result = hash((salt,)), []
    for token in tokens:
        state = hash((state, token))
        result.append(state)
    return result


def next_token(digest: int) -> int:
    return digest % VOCABULARY


class World:
    """A scheduler, its memory, and what must hold."""

    def __init__(self, *, num_pages: int, retention: Retention, limits: Limits, seed: int = 0) -> None:
        self.pool = PagePool(num_pages)
        self.retention, self.limits = retention, limits
        self.scheduler = Scheduler(self.pool, retention, limits)
        self.memory: list[list[int | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.rolling: list[dict[int, int]] = [{} for _ in range(num_pages)]  # by page and slot: of convolutions
        self.random = random.Random(seed)
        self.next_row: dict[int, int] = {}  # of running sequences: the row that must come next
        self.prompts: dict[int, tuple[list[int], str, int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.finished: dict[int, int] = {}  # step in which it ended
        self.steps = self.drafted = self.accepted = 0
        self._ids = 0

    def add(self, tokens: list[int], *, answer: int, priority: int = 0, salt: str = "") -> int:
        self._ids += 1
        sequence = Sequence(
            id=self._ids,
            tokens=array("i", tokens),
            max_length=len(tokens) + answer,
            priority=priority,
            salt=salt,
        )
        self.prompts[self._ids] = (tokens, salt, answer)
        self.scheduler.add(sequence)
        return self._ids

    def cancel(self, id: int, *, keep: bool = True) -> None:
        held = self.scheduler.sequences[id].held_pages
        free = self.pool.num_free
        alone = sum(self.pool.holders(page) == 1 for page in held)
        self.scheduler.end(id, keep=keep)
        self.next_row.pop(id, None)
        assert self.pool.num_free == free + alone, "a cancelled request frees its pages at once"

    def expected(self, id: int) -> list[int]:
        """The answer to this prompt when it is alone."""
        tokens, salt, length = self.prompts[id]
        state, answer = digests(tokens, salt)[-1], []
        for _ in range(length):
            answer.append(next_token(state))
            state = hash((state, answer[-1]))
        return answer

    # ---- one step

    def step(self, *, cancel: float = 0.0, guess: float = 0.0) -> Step:
        """Schedules, runs and advances; `cancel`, `guess`: how often a request is cancelled meanwhile, or guessed."""
        self.steps += 1
        decoding = {sequence.id for sequence in self.scheduler.running if sequence.decoding}
        self._guess(guess)
        preemptions = self.scheduler.counters.preemptions
        step = self.scheduler.schedule(cost)
        assert step.pieces or not self.scheduler.has_work, "there is work and nothing runs"
        preempted = self.scheduler.counters.preemptions > preemptions
        if preempted:
            self._forget_preempted()
        self._check_limits(step, decoding, preempted)
        self._execute(step)
        for id in list(self.scheduler.sequences):
            if self.random.random() < cancel:
                self.cancel(id, keep=self.random.random() < 0.8)
        drawn = {piece.sequence.id: self._draw(piece) for piece in step.pieces if piece.num_outputs}
        self.scheduler.advance(step, drawn)
        self._settle(step)
        self.check()
        return step

    def _guess(self, share: float) -> None:
        for sequence in self.scheduler.running:
            if self.random.random() >= share:
                continue
            state = digests(sequence.tokens, sequence.salt)[-1]
            guesses = []
            for _ in range(self.random.randrange(6 if self.retention.takes_back is None else 40)):
                right = self.random.random() < 0.7
                guesses.append(next_token(state) if right else self.random.randrange(VOCABULARY))
                state = hash((state, guesses[-1]))
            self.scheduler.propose(sequence.id, guesses)

    def _forget_preempted(self) -> None:
        """Who gave its pages back begins anew, in the same step if what is known of it leaves it room after all."""
        for id, row in list(self.next_row.items()):
            sequence = self.scheduler.sequences[id]
            if not sequence.running or sequence.num_computed < row:
                del self.next_row[id]

    def _execute(self, step: Step) -> None:
        for source, destination in step.copies:
            self.memory[destination] = list(self.memory[source])
            self.rolling[destination] = dict(self.rolling[source])
        writes = Counter(
            page for piece in step.pieces for page in {self._page(piece, row) for row in range(piece.start, piece.end)}
        )
        assert max(writes.values(), default=0) <= 1, "two sequences write one page"
        for piece in step.pieces:
            self._run(piece)

    def _page(self, piece: Piece, position: int) -> int:
        return piece.sequence.pages[position // PAGE]

    def _run(self, piece: Piece) -> None:
        sequence, rows = piece.sequence, len(piece.tokens)
        known = sequence.tokens[piece.start : piece.end - piece.num_drafts]
        assert piece.tokens[: rows - piece.num_drafts] == known, "rows are the tokens at their positions"
        assert piece.start == self.next_row.get(sequence.id, piece.start), "a position is computed once, in order"
        truth = digests(sequence.tokens[: piece.start] + piece.tokens, sequence.salt)
        for position in range(piece.start):
            if self._visible(position, piece.start):
                held = self.memory[self._page(piece, position)][position % PAGE]
                assert self._page(piece, position) != GONE and held == truth[position], f"position {position} is wrong"
        if self.retention.takes_back is not None:
            self._look_back(piece, truth)
        for position in range(piece.start, piece.end):
            page = self._page(piece, position)
            self.rolling[page][position % STATE_ROWS] = truth[position]
            assert page != GONE and self.pool.holders(page) == 1, "a page that is written has one holder"
            self.memory[page][position % PAGE] = truth[position]

    def _look_back(self, piece: Piece, truth: list[int]) -> None:
        """The rows right before, which a page keeps only as long as few rows follow them."""
        assert self.retention.takes_back is not None
        seen = STATE_ROWS - self.retention.takes_back
        for position in range(max(0, piece.start - seen), piece.start):
            kept = self.rolling[self._page(piece, position)].get(position % STATE_ROWS)
            assert kept == truth[position], f"the state at {position} is wrong"

    def _visible(self, position: int, row: int) -> bool:
        window = self.retention.window
        return window is None or position > row - window or position < self.retention.sinks

    def _draw(self, piece: Piece) -> list[int]:
        """What a model would say after these rows; guesses count while they are what it says."""
        guesses = piece.tokens[len(piece.tokens) - piece.num_drafts :]
        states = digests(piece.sequence.tokens[: piece.end - piece.num_drafts] + guesses, piece.sequence.salt)
        drawn = []
        for row in range(piece.num_outputs):
            drawn.append(next_token(states[piece.end - piece.num_outputs + row]))
            if row >= len(guesses) or drawn[-1] != guesses[row]:
                break
        self.drafted += piece.num_drafts
        self.accepted += len(drawn) - 1
        return drawn

    def _settle(self, step: Step) -> None:
        for piece in step.pieces:
            sequence = piece.sequence
            if sequence.id not in self.scheduler.sequences:
                continue
            self.next_row[sequence.id] = sequence.num_computed
            if len(sequence.tokens) >= sequence.max_length:
                prompt = len(self.prompts[sequence.id][0])
                self.answers[sequence.id] = list(sequence.tokens[prompt:])
                self.finished[sequence.id] = self.steps
                self.cancel(sequence.id)

    # ---- what must hold

    def _check_limits(self, step: Step, decoding: set[int], preempted: bool) -> None:
        assert step.num_rows <= self.limits.max_rows
        assert len(self.scheduler.running) <= self.limits.max_num_seqs
        for sequence in self.scheduler.running:
            assert sequence.num_held <= self.retention.peak(len(sequence.tokens), self.limits.max_rows)
        if not decoding or preempted:
            return
        scheduled = {piece.sequence.id for piece in step.pieces}
        assert decoding <= scheduled, "everybody who waits for a next token gets a row"
        nexts = [piece for piece in step.pieces if len(piece.tokens) - piece.num_drafts == 1 and piece.num_outputs]
        reads = sum(self.retention.reads(piece.start, len(piece.tokens)) for piece in step.pieces)
        alone = cost(len(nexts), sum(self.retention.reads(piece.start, 1) for piece in nexts))
        if cost(step.num_rows, reads) > alone + self.limits.step_ms and len(step.pieces) > 1:
            assert sum(len(piece.tokens) for piece in step.pieces if piece not in nexts) <= 1, "over the budget"
            assert not any(piece.num_drafts for piece in nexts), "guesses over the budget"

    def check(self) -> None:
        """Pages and holders, the tree's word against memory."""
        self.pool.check()
        held = Counter(page for sequence in self.scheduler.running for page in sequence.held_pages)
        for page in range(self.pool.num_pages):
            assert self.pool.holders(page) == held[page], "holders are counted wrongly"
        for sequence in self.scheduler.waiting:
            assert not sequence.pages and not sequence.running
        for sequence in self.scheduler.running:
            needed = self.retention.needed(sequence.num_computed)
            assert all(sequence.pages[index] != GONE for index in needed), "a visible page was given back"
            assert sequence.num_gone == sequence.pages.count(GONE)
        for salt, keys, page in self.scheduler.tree.contents():
            truth = digests(array("i", b"".join(keys)), salt)
            size = len(keys[-1]) // array("i").itemsize
            assert self.memory[page][:size] == truth[-size:], "the tree has a page with other tokens"

    def drain(self, most: int = 20_000, **often: float) -> None:
        """Runs until all are done; then the pool is whole."""
        while self.scheduler.has_work:
            assert self.steps < most, "somebody starves"
            self.step(**often)
        assert self.pool.num_free == self.pool.num_pages
        assert not self.scheduler.running and not self.scheduler.waiting
        for id, answer in self.answers.items():
            assert answer == self.expected(id), f"sequence {id} depends on its neighbours"
