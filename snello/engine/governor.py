"""How many guesses are worth their time, and whether to guess at all.

Two questions, two answers. Per sequence and source: how often were guesses right lately? With acceptance p, k of them
bring p + p^2 + ... + p^k tokens more, each worth what it saves of steps without guesses; the k that gains most is
taken. For the engine as a whole, and for each answer: an account. Guesses pay for their drafts and rows and are paid
for tokens they saved, and a small share of all time is paid in. Nothing is guessed while the engine's is overdrawn, so
what guessing can lose is that share, whatever the text does; and no more rows in an answer than its own account holds,
so that one answer's luck does not pay for the next one's losses. All prices are measured; the clock decides how soon a
token comes, never which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from snello.engine.cost import StepTimes

NEWEST = 0.15  # weight of the newest guess in a sequence's acceptance; at first more
NEWEST_OF_ALL = 0.02  # and in a source's, where new sequences begin
HOPE_GUESSES = 2  # that what is hoped for counts as
SHARE = 0.005  # of all time is paid in
CREDIT_STEPS = 4.0  # steps that the account begins with
CAP_STEPS = 32.0  # more is not saved up: past luck does not pay for losses without end
OWN_STEPS, OWN_SHARE = 1.5, 0.01  # an answer's account begins with so many steps or that share of its tokens,
LUCK, MOST_LUCK = 0.05, 8.0  # times right guesses for each wrong one: weight of the newest step's, and at most
MOST = 15  # guesses of a sequence in a step
RETRY_STEPS, RETRY_MOST = 24, 384  # without a guess, after which one is tried; doubled when it was wrong


class Source(NamedTuple):
    """Where guesses come from, and how often they are right before any was seen."""

    name: str
    hope: float


class Load(NamedTuple):
    """A step without guesses: so many next tokens, the positions that they read, and what rows and reads cost.

    `waiting` is whether others wait for a place in the batch.
    """

    sequences: int
    reads: int
    cost: StepTimes
    waiting: bool = False

    @property
    def own_reads(self) -> int:
        return self.reads // self.sequences

    def token_ms(self) -> float:
        """What it saves that one sequence needs a token less.

        Where others wait, its place in the batch is theirs sooner: a sequence's share of the step. Where none do, the
        other sequences' steps run all the same, and only its row is saved; a sequence alone saves its step.
        """
        whole = self.cost(self.sequences, self.reads)
        if self.waiting or self.sequences == 1:
            return whole / self.sequences
        return max(whole - self.cost(self.sequences - 1, self.reads - self.own_reads), 0.0)


@dataclass
class Tally:
    """Guesses that ran, and those that were right."""

    proposed: int = 0
    accepted: int = 0


@dataclass
class _Rate:
    """How often guesses were right lately."""

    acceptance: float
    weight: float  # of the newest guess, once enough were seen
    seen: int = 0
    idle: int = 0  # steps since the last guess
    patience: int = RETRY_STEPS

    def add(self, accepted: int, proposed: int) -> None:
        """The first `accepted` were right and the next was wrong."""
        for right in [1.0] * accepted + [0.0] * (accepted < proposed):
            self.seen += 1
            self.acceptance += max(self.weight, 1 / (self.seen + HOPE_GUESSES)) * (right - self.acceptance)
        self.idle = 0
        self.patience = RETRY_STEPS if accepted else min(2 * self.patience, RETRY_MOST)


class Governor:
    """Asked by a drafter before it drafts; told by the engine what came of it."""

    def __init__(self) -> None:
        self._records: dict[int, dict[Source, _Rate]] = {}
        self._shared: dict[Source, _Rate] = {}
        self._tallies: dict[Source, Tally] = {}
        self._asked: dict[int, Source] = {}  # by sequence: the source of what was granted last
        self._invested: dict[int, float] = {}
        self._invested_now = 0.0  # since `begin`
        self._load: Load | None = None
        self._rows = self._reads = 0  # of this step, with what was granted
        self._step_ms = self._token_ms = 0.0
        self._balance: float | None = None
        self._resting = False
        self._own: dict[int, float] = {}  # by sequence, less what has been earned since the start
        self._earned = 0.0
        self._right = 0.5  # of guesses, lately
        self._ran: dict[int, int] = {}  # guesses by sequence, in the step that is observed

    # ---- before a step

    @property
    def overdrawn(self) -> bool:
        """Until there is enough for more than one draft: many in a row are cheaper than one now and then."""
        return self._resting or (self._balance is not None and self._balance < 0)

    def may_guess(self, id: int) -> bool:
        """Whether this answer's own account, if it has one, is not overdrawn."""
        own = self._own.get(id)
        return own is None or own + self._earned >= 0

    def begin(self, load: Load, remaining: Mapping[int, int]) -> bool:
        """A step with this load comes next. False: no guesses in it.

        `remaining`: by sequence that may guess, tokens that it may still have.
        """
        self._load, self._rows, self._reads = load, load.sequences, load.reads
        self._step_ms, self._token_ms = load.cost(load.sequences, load.reads), load.token_ms()
        self._invested_now = 0.0
        if self._balance is None:
            self._balance = CREDIT_STEPS * self._step_ms
        for id, tokens in remaining.items():
            if id not in self._own:  # a step's losses are everybody's
                luck = min(self._right / max(1 - self._right, 1e-3), MOST_LUCK)
                credit = luck * min(OWN_STEPS, OWN_SHARE * tokens) * self._step_ms / load.sequences
                self._own[id] = min(credit, max(self._balance, 0.0)) - self._earned
        return not self.overdrawn

    def worth(self, id: int, source: Source, most: int, *, price: float = 0.0, trial: int = 1) -> int:
        """Guesses of this sequence, 0 to `most`, where drafting one costs `price` milliseconds.

        Where none has been worth it for long, `trial` are.
        """
        record = self._record(id, source)
        best, _ = self._best(record.acceptance, most, price, self._own[id] + self._earned)
        if not best and most:
            record.idle += 1
            self._shared[source].idle += 1
            best = min(most, trial) if record.idle > record.patience else 0
        if best:
            self._asked[id] = source
            self._rows += best
            assert self._load is not None
            self._reads += best * self._load.own_reads
        return best

    def affords(self, id: int, source: Source, ms: float, remaining: int, price: float) -> bool:
        """Whether to spend `ms` now, such as on reading a prompt, so that `remaining` tokens can be guessed."""
        assert self._balance is not None
        if ms <= min(self._balance - sum(self._invested.values()), self._own[id] + self._earned):
            return True
        acceptance = self._record(id, source).acceptance
        count, gain = self._best(acceptance, min(remaining, MOST), price)
        steps = remaining / (1 + sum(acceptance**each for each in range(1, count + 1)))
        return ms < gain * steps / 2  # answers end before they must

    def _best(self, acceptance: float, most: int, price: float, budget: float = math.inf) -> tuple[int, float]:
        """(guesses, milliseconds gained in expectation): the most, where all of them may be lost on `budget`."""
        load = self._load
        assert load is not None
        value = self._token_ms
        best, gain, expected, chance = 0, 0.0, 0.0, 1.0
        for count, spent in enumerate(load.cost.more(self._rows, self._reads, most, load.own_reads), 1):
            if spent + count * price > budget:
                break
            chance *= acceptance
            expected += chance
            if (won := expected * value - spent - count * price) > gain:
                best, gain = count, won
            if chance < 0.01:
                break
        return best, gain

    def _record(self, id: int, source: Source) -> _Rate:
        records = self._records.setdefault(id, {})
        if source not in records:
            shared = self._shared.setdefault(source, _Rate(source.hope, NEWEST_OF_ALL))
            records[source] = _Rate(shared.acceptance, NEWEST, idle=shared.idle)
        return records[source]

    # ---- after it

    def pay(self, ms: float, id: int | None = None) -> None:
        """Drafting took so long. With a sequence: so much of that was an investment in it, due when it ends."""
        assert self._balance is not None
        if id is None:
            self._balance -= max(0.0, ms - self._invested_now)
        else:
            self._invested[id] = self._invested.get(id, 0.0) + ms
            self._invested_now += ms

    def earn(self, ms: float) -> None:
        """A step took so long."""
        if self._balance is not None:
            self._balance += SHARE * ms
            self._earned += SHARE * ms
            self._resting = self._balance < (self._step_ms if self._resting else 0.0)

    def ran(self, cost: StepTimes, rows: int, reads: int, guesses: int, guess_reads: int) -> None:
        """So many of the rows and reads of a step were guesses, those that were observed since the last one."""
        if self._balance is not None:
            spent = cost(rows, reads) - cost(rows - guesses, reads - guess_reads)
            self._balance -= spent
            for id, count in self._ran.items():
                if id in self._own:
                    self._own[id] -= spent * count / guesses
        self._ran.clear()

    def observe(self, id: int, proposed: int, accepted: int) -> None:
        """So many guesses ran, and so many of the first were right; those after a wrong one say nothing."""
        if not proposed:
            return
        source = self._asked[id]
        self._record(id, source).add(accepted, proposed)
        self._shared[source].add(accepted, proposed)
        tally = self._tallies.setdefault(source, Tally())
        tally.proposed += proposed
        tally.accepted += accepted
        self._right += LUCK * (accepted / proposed - self._right)
        self._ran[id] = proposed
        if self._balance is not None:
            cap, won = CAP_STEPS * self._step_ms, accepted * self._token_ms
            self._balance = min(self._balance + won, cap + sum(self._invested.values()))
            if id in self._own:
                self._own[id] = min(self._own[id] + won, cap - self._earned)

    def forget(self, id: int) -> None:
        """This sequence has ended: what was invested in it is due."""
        self._records.pop(id, None)
        self._asked.pop(id, None)
        self._own.pop(id, None)
        if self._balance is not None:
            self._balance -= self._invested.pop(id, 0.0)

    # ---- facts

    @property
    def tallies(self) -> Mapping[Source, Tally]:
        """By source, since the start."""
        return MappingProxyType(self._tallies)

    @property
    def proposed(self) -> int:
        return sum(tally.proposed for tally in self._tallies.values())

    @property
    def accepted(self) -> int:
        return sum(tally.accepted for tally in self._tallies.values())
