"""Who runs next: prompts and next tokens of many requests in one step, within the budget of time and pages.

It has no clock, no thread and no model: sequences and costs come in, a `Step` comes out, and what was drawn comes back.
Each step gives every sequence that waits for its next token one row, fills up with prompts in order, and admits who
waits while there is room (continuous batching: Yu et al. 2022, Orca). When pages run out the last in order gives its
own back and is computed again later, mostly from the prefix tree, which still knows them.

Order is one fixed number per sequence, `rank`: the step in which it came, plus `PATIENCE` for each level of priority.
It never changes, and whoever is first in order never gives way, so everybody gets there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from snello.engine.pages import GONE, PagePool, Retention
from snello.engine.plan import Limits, Plan, StepCost
from snello.engine.prefix import PAGE, Match, PrefixTree, common_length
from snello.engine.sequence import Sequence, Step

PATIENCE = 256  # steps that one level of priority is worth
LOOKAHEAD = 32  # how many in the queue may be passed because they wait for a beginning that somebody computes already


@dataclass
class Counters:
    """Since the start: steps, prompt tokens that were admitted, those of them that were known, sequences put back."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Decides step by step. Owns all sequences; pages and tree are used by it and by nobody beside it in a step."""

    def __init__(self, pool: PagePool, retention: Retention, limits: Limits) -> None:
        assert 1 <= limits.max_num_seqs <= limits.max_rows
        self.pool, self.retention, self.limits = pool, retention, limits
        self.tree = PrefixTree(pool, retention)
        self.counters = Counters()
        self.sequences: dict[int, Sequence] = {}
        self.running: list[Sequence] = []  # in order of rank, as is
        self.waiting: list[Sequence] = []
        self._arrivals = 0

    # ---- from outside

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. It must be one that fits the cache alone, with at least one token."""
        assert sequence.id not in self.sequences and 0 < len(sequence.tokens) <= sequence.max_length
        assert self.retention.peak(sequence.max_length, self.limits.max_rows) <= self.pool.num_pages
        self._arrivals += 1
        sequence.rank = (self.counters.steps + sequence.priority * PATIENCE, self._arrivals)
        self.sequences[sequence.id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def propose(self, id: int, drafts: Tokens[int]) -> None:
        """Guesses of the tokens that follow, for the next step; cut short where they do not fit."""
        sequence = self.sequences[id]
        if sequence.decoding:
            sequence.drafts = list(drafts)

    def end(self, id: int, *, keep: bool = True) -> None:
        """Finished, cancelled or failed: its pages are free at once. `keep`: what they say stays known.

        May be called between `schedule` and `advance` too.
        """
        sequence = self.sequences.pop(id)
        if sequence.running:
            self._retire(sequence, keep=keep)
        else:
            _take_out(self.waiting, sequence)

    def schedule(self, cost: StepCost, overrun: float = 1.0) -> Step:
        """The next step; empty only when there is nothing to do, or when others hold the pages of the pool.

        Args:
            cost: (rows, positions that they read together) -> predicted milliseconds; must not fall with either.
            overrun: how much longer than predicted prompts make a step, at worst.
        """
        self.counters.steps += 1
        plan = Plan(self.limits, self.retention, cost, overrun)
        for sequence in list(self.running):
            if sequence.decoding and self._make_room(sequence, len(sequence.tokens), plan):
                plan.add(sequence, 1)
        for sequence in list(self.running):
            if sequence.num_pending > 1 and sequence.running:
                self._prefill(sequence, plan)
        if self.waiting:
            self._admit(plan)
        for piece in plan.decodes:
            sequence = piece.sequence
            if sequence.drafts:
                room = len(sequence.pages) * PAGE - piece.end
                if self.retention.takes_back is not None:
                    room = min(room, self.retention.takes_back)
                plan.draft(piece, min(room, sequence.max_length - len(sequence.tokens) - 1))
        return plan.step()

    def advance(self, step: Step, drawn: Mapping[int, Tokens[int]]) -> None:
        """The step has run. `drawn`: by sequence the tokens after its output rows: accepted guesses and one more."""
        for piece in step.pieces:
            sequence = piece.sequence
            if not sequence.running or self.sequences.get(sequence.id) is not sequence:
                continue  # ended meanwhile
            tokens = drawn.get(sequence.id, ())
            assert bool(tokens) == bool(piece.num_outputs), "a token is drawn exactly where one was wanted"
            accepted = max(0, len(tokens) - 1)
            before, sequence.num_computed = sequence.num_computed, piece.end - piece.num_drafts + accepted
            sequence.tokens.extend(tokens)
            self._publish(sequence, before)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    # ---- rows

    def _prefill(self, sequence: Sequence, plan: Plan) -> None:
        rows = plan.fit(sequence)
        if rows and self._make_room(sequence, sequence.num_computed + rows, plan):
            plan.add(sequence, rows)

    def _admit(self, plan: Plan) -> None:
        """Takes sequences from the queue in order, as long as there is room."""
        index = 0
        while index < min(len(self.waiting), LOOKAHEAD):
            sequence = self.waiting[index]
            if not plan.fit(sequence) or not self._has_slot(sequence):
                return
            match, wait = self._known(sequence)
            if wait:
                index += 1
                continue
            if not self._has_room(sequence, match, plan):
                return
            _take_out(self.waiting, sequence)
            self._start(sequence, match, plan)
            self._prefill(sequence, plan)
            assert sequence.running, "what was admitted has room"

    # ---- what is known already

    def _known(self, sequence: Sequence) -> tuple[Match, bool]:
        """What need not be computed, from the tree or from a neighbour's unfinished page; and whether to wait for more.

        At least one token is left to compute: its logits are wanted.
        """
        wanted = sequence.tokens[: len(sequence.tokens) - 1]
        match, head, more = self.tree.match(wanted, salt=sequence.salt), wanted[:8], 0
        for other in self.running:
            if other.salt != sequence.salt or other.tokens[: len(head)] != head:
                continue
            shared = common_length(other.tokens, wanted)
            if self.retention.takes_back is not None:
                shared -= shared % PAGE
            now = min(shared, other.num_computed)
            if match.num_partial < now - match.num_tokens < PAGE and other.pages[now // PAGE] != GONE:
                partial = other.pages[now // PAGE]
                match = Match(pages=match.pages, partial=partial, num_partial=now - match.num_tokens)
            if other.num_pending > 1:
                more = max(more, shared)
        known = match.num_tokens + match.num_partial
        gain = more - known
        if self.retention.window is not None:
            match = match.seen_from(set(self.retention.needed(known)))
        return match, gain > 0 and 2 * gain >= min(len(wanted) - known, PAGE)

    def _start(self, sequence: Sequence, match: Match, plan: Plan) -> None:
        """Takes hold of what is known. A page of which only the beginning fits is copied, since it will be written."""
        sequence.pages, sequence.num_computed = array("i", match.pages), match.num_tokens
        sequence.num_gone = match.pages.count(GONE)
        for page in sequence.held_pages:
            self.pool.share(page)
        if match.partial is not None:
            copy = self.pool.allocate()
            plan.copies.append((match.partial, copy))
            sequence.pages.append(copy)
            sequence.num_computed += match.num_partial
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.counters.prompt_tokens += len(sequence.tokens)
            self.counters.cached_tokens += sequence.num_computed
        sequence.running = True
        insort(self.running, sequence, key=_rank)

    def _publish(self, sequence: Sequence, before: int) -> None:
        """Whole pages are known to all from now on; those out of sight go back."""
        for index in range(before // PAGE, sequence.num_computed // PAGE):
            page = sequence.pages[index]
            known = self.tree.insert(sequence.tokens, (index + 1) * PAGE, page, salt=sequence.salt)
            if known != page:  # somebody computed the same: hold theirs
                self.pool.share(known)
                self.pool.free([page])
                sequence.pages[index] = known
        if self.retention.window is not None:
            first = self.retention.first(sequence.num_computed)
            for index in range(self.retention.pinned() + sequence.num_gone, min(first, len(sequence.pages))):
                self.pool.free([sequence.pages[index]])
                sequence.pages[index] = GONE
                sequence.num_gone += 1

    # ---- pages

    def _make_room(self, sequence: Sequence, length: int, plan: Plan) -> bool:
        """Pages for `length` positions; the last in order give way. False: it was itself the last."""
        while len(sequence.pages) * PAGE < length:
            while not self.pool.num_free:
                self._preempt(self.running[-1], plan)
                if not sequence.running:
                    return False
            sequence.pages.append(self.pool.allocate())
        return True

    def _has_room(self, sequence: Sequence, match: Match, plan: Plan) -> bool:
        """Whether it can be admitted; sequences of lower priority give way for that."""
        while not self._fits(sequence, match):
            if not self._last_gives_way(sequence):
                return False
            self._preempt(self.running[-1], plan)
        return True

    def _has_slot(self, sequence: Sequence) -> bool:
        return len(self.running) < self.limits.max_num_seqs or self._last_gives_way(sequence)

    def _last_gives_way(self, sequence: Sequence) -> bool:
        last = self.running[-1] if self.running else None
        return last is not None and last.priority > sequence.priority and last.rank > sequence.rank

    def _fits(self, sequence: Sequence, match: Match) -> bool:
        """A slot, and pages for what is known of it and of all that run, and for the page after that."""
        if len(self.running) >= self.limits.max_num_seqs:
            return False
        shared = [page for page in match.pages if page != GONE]
        idle = sum(not self.pool.holders(page) for page in shared)
        claimed = sum(self._peak(other, PAGE) - other.num_held for other in self.running)
        needed = max(1, self._peak(sequence, PAGE if self.running else 0) - len(shared))
        return needed <= self.pool.num_free - idle - claimed

    def _peak(self, sequence: Sequence, ahead: int) -> int:
        return self.retention.peak(min(len(sequence.tokens) + ahead, sequence.max_length), self.limits.max_rows)

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        self.counters.preemptions += 1
        plan.remove(sequence)
        self._retire(sequence, keep=True)
        insort(self.waiting, sequence, key=_rank)

    def _retire(self, sequence: Sequence, *, keep: bool) -> None:
        """Gives all pages back."""
        rest = sequence.num_computed % PAGE
        if keep and rest:
            page = sequence.pages[sequence.num_computed // PAGE]
            self.tree.insert(sequence.tokens, sequence.num_computed, page, salt=sequence.salt)
        self.pool.free(sequence.held_pages)
        sequence.pages, sequence.num_computed, sequence.num_gone = array("i"), 0, 0
        sequence.drafts, sequence.running = [], False
        _take_out(self.running, sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _take_out(ordered: list[Sequence], sequence: Sequence) -> None:
    del ordered[bisect_left(ordered, sequence.rank, key=_rank)]
