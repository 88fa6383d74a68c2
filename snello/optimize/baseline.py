"""The first three rows of every ladder: the original, the original again, and a planted fault.

They judge the instrument before it judges anybody: the same model twice must differ by exactly nothing, and a damaged
one whose loss is 1.1 times the budget must be refused by the judge that the stages will meet.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias

from snello.errors import Unsupported
from snello.measure import quality
from snello.measure.interval import Interval
from snello.measure.rulers import Reading
from snello.measure.timing import Ratio
from snello.optimize.candidate import Candidate
from snello.optimize.events import Event, LadderRow, StageStarted
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.gate import judge_quality
from snello.optimize.ledger import Ledger
from snello.optimize.recipe import GOALS
from snello.optimize.work import Report

Run: TypeAlias = Generator[Event, None, Any]
AGAIN_BLOCKS = 16


def original_row(examiner: Examiner, ledger: Ledger) -> Run:
    """The original's own speed and habits."""
    original = examiner.original
    original.speed = yield from examiner.speed(original, "original")
    original.sequences = yield from examiner.sequences(original, "original")
    if original.spec.causal:
        original.habits = yield from examiner.habits(original, "original")
    if examiner.request.metric is not None:  # one that does not work is told before any stage
        yield from examiner.metric(original, "original")
    own = examiner.runners.weights_bytes(original)
    row = LadderRow(index=1, name="original", kind="original", verdict="original", reason="", weights_bytes=own)
    ledger.receipts.append(ledger.receipt(row, original))
    return row


def again_row(examiner: Examiner, ledger: Ledger) -> Run:
    """The original against itself: its loss must be exactly zero and its speed the same."""
    original, goal = examiner.original, examiner.request.goal
    yield StageStarted(index=2, stage="original again", predicted_seconds=0.0)
    loss: Interval = yield from again(examiner, "select", "original again")
    timed: Ratio | None = yield from examiner.ratio(original, original, goal, "original again", quads=4)
    if timed is None:
        hint = f"choose another goal: {', '.join(other for other in GOALS if other != goal)}"
        raise Unsupported(f"the goal {goal} cannot be measured for this model here", hint)
    original.cost = timed.a
    if goal == "memory":
        original.peak = int(max(max(pair) for pair in timed.pairs))
    steady = loss == Interval.exact(0.0) and timed.steady
    row = LadderRow(
        index=2,
        name="original again (A/A)",
        kind="again",
        verdict="steady" if steady else "unsteady",
        reason="instrument steady" if steady else unsteady(loss, timed),
        loss=loss,
        speedup=timed.interval.inverse(),
        weights_bytes=examiner.runners.weights_bytes(original),
    )
    ledger.receipts.append(ledger.receipt(row, original, costs=(cost_ratio(goal, "original", timed),)))
    return row


def again(examiner: Examiner, cut: str, stage: str) -> Run:
    """The loss of the original against itself on the first blocks of a cut, read anew."""
    original = examiner.original
    first: Reading = yield from examiner.read(original, cut, stage)
    blocks = examiner.texts.blocks(cut)[:AGAIN_BLOCKS]
    inputs = {"model": original.digest, "text": examiner.texts.sha256, "again": len(blocks), "cut": cut}

    def work(report: Report) -> Any:
        def step(done: int, total: int) -> None:
            report("score again", done, total, "window")

        return None, examiner.ruler.read(examiner.runners(original), blocks, step).save()

    unit = yield from examiner.worker.unit(stage, "again", inputs, work)
    before, after = Reading(first.values[: len(blocks)]), Reading.load(dict(unit.arrays))
    return quality.compare(examiner.ruler, before, after, blocks, seed=examiner.seed, same_model=True).loss


def unsteady(loss: Interval, timed: Ratio) -> str:
    if loss != Interval.exact(0.0):
        return "the same model gave other numbers"
    return f"timing is noisy: known to {100 * timed.interval.half_width:.1f}%, wanted 1.5%"


def fault_row(examiner: Examiner, ledger: Ledger, original: Reading, fault: Reading) -> LadderRow:
    """A damaged reading, 1.1 times the budget, before the same judge."""
    blocks, max_loss = examiner.texts.blocks("select"), examiner.request.max_loss
    found = quality.compare(examiner.ruler, original, fault, blocks, seed=examiner.seed)
    caught = judge_quality(found.loss, max_loss) is not None
    row = LadderRow(
        index=3,
        name="planted fault",
        kind="fault",
        verdict="caught" if caught else "not caught",
        reason=f"made {quality.FAULT} times the budget",
        loss=found.loss,
    )
    ledger.receipts.append(ledger.receipt(row, None))
    return row


def first_rows(examiner: Examiner, ledger: Ledger, fault: Reading) -> Run:
    """All three, as a list."""
    original: Candidate = examiner.original
    assert original.select is not None
    first = yield from original_row(examiner, ledger)
    second = yield from again_row(examiner, ledger)
    return [first, second, fault_row(examiner, ledger, original.select, fault)]
