"""A step in the making: rows are added while they fit the step's budget.

The budget is time: a prompt may not stall those who wait for their next token. What a step takes is predicted by a
function from outside, and rows of prompts are cut where they would make it longer than next tokens alone by more than
the budget (chunked prefill: Agrawal et al. 2023, arXiv 2308.16369). When nobody waits for a next token there is nobody
to stall, and rows are limited only by what one step can take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snello.engine.pages import Retention
from snello.engine.sequence import Piece, Sequence, Step

StepCost = Callable[[int, int], float]  # (rows, positions that they read together) -> milliseconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one step may take.

    Attributes:
        max_rows: rows that the executor runs at once.
        max_num_seqs: sequences that hold pages at the same time; at most `max_rows`, so that each can go on.
        step_ms: milliseconds by which prompts may lengthen a step while somebody waits for a next token, in 95 of 100
            steps; the first prompt gets one row even so.
    """

    max_rows: int
    max_num_seqs: int
    step_ms: float = 50.0


class Plan:
    """Pieces and copies so far, and how many rows still fit.

    Args:
        overrun: how much longer than predicted prompts make a step, at worst; the budget is so much smaller.
    """

    def __init__(self, limits: Limits, retention: Retention, cost: StepCost, overrun: float = 1.0) -> None:
        self._limits, self._retention, self._cost = limits, retention, cost
        self._step_ms = limits.step_ms / overrun
        self.pieces: dict[int, Piece] = {}
        self.copies: list[tuple[int, int]] = []
        self.rows = self.reads = 0
        self.decodes: list[Piece] = []
        self.prompted = False  # a prompt has got rows

    @property
    def rows_left(self) -> int:
        return self._limits.max_rows - self.rows

    def add(self, sequence: Sequence, rows: int) -> None:
        """The next `rows` known tokens of a sequence."""
        start, end = sequence.num_computed, sequence.num_computed + rows
        outputs = int(end == len(sequence.tokens))
        piece = Piece(sequence=sequence, start=start, tokens=sequence.tokens[start:end], num_outputs=outputs)
        if sequence.num_pending == 1:
            self.decodes.append(piece)
        else:
            self.prompted = True
        self.pieces[sequence.id] = piece
        self._count(start, rows)

    def draft(self, piece: Piece, most: int) -> None:
        """Puts guesses behind a next token, as many as fit; the others are dropped."""
        guesses, piece.sequence.drafts = piece.sequence.drafts, []
        wanted = min(len(guesses), most, self.rows_left)
        count = self._within_budget(piece.end, wanted) if len(self.pieces) > 1 else max(0, wanted)
        piece.tokens.extend(guesses[:count])
        piece.num_drafts, piece.num_outputs = count, 1 + count
        self._count(piece.end - count, count)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out again: its pages were needed elsewhere."""
        piece = self.pieces.pop(sequence.id, None)
        if piece is not None:
            self._count(piece.start, len(piece.tokens), sign=-1)
            self.decodes = [other for other in self.decodes if other is not piece]

    def fit(self, sequence: Sequence) -> int:
        """How many of its known tokens may run in this step; the first prompt always gets a row if there is one."""
        wanted = min(sequence.num_pending, self.rows_left)
        if not self.decodes:
            return wanted
        rows = self._within_budget(sequence.num_computed, wanted)
        return rows if rows or self.prompted else min(1, wanted)

    def _within_budget(self, start: int, wanted: int) -> int:
        """The most rows from `start` on that the budget allows, by halving: a step only gets dearer with rows."""
        low, high, budget = 0, max(0, wanted), self._budget()
        middle = high
        while low < high:
            if self._cost(self.rows + middle, self.reads + self._retention.reads(start, middle)) <= budget:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def _budget(self) -> float:
        reads = sum(self._retention.reads(piece.start, 1) for piece in self.decodes)
        return self._cost(len(self.decodes), reads) + self._step_ms

    def _count(self, start: int, rows: int, sign: int = 1) -> None:
        self.rows += sign * rows
        self.reads += sign * self._retention.reads(start, rows)

    def step(self) -> Step:
        """Rows of one adapter lie together: its matrices are read once for all of them."""
        pieces = sorted(self.pieces.values(), key=lambda piece: piece.sequence.adapter)
        return Step(copies=self.copies, pieces=pieces)
