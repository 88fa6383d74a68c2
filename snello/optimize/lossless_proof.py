"""The proof of a pair: answers to text that nothing has seen, timed beside the original's and compared with them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeAlias

from snello.measure.interval import Interval
from snello.optimize.baseline import again
from snello.optimize.events import Event
from snello.optimize.examine import cost_ratio
from snello.optimize.lossless import DIFFER, Timed, answers_ratio, evidence
from snello.optimize.proof import Proof, engine_speedup

if TYPE_CHECKING:
    from snello.optimize.climb import Climb

Run: TypeAlias = Generator[Event, None, Any]
PROOF_QUADS = 10


def prove_lossless(climb: Climb) -> Run:
    """Answers to the text that nothing has seen: as fast as on the selection, and the same."""
    examiner, pair, goal = climb.examiner, climb.best, climb.request.goal
    timed: Timed = yield from answers_ratio(examiner, pair, goal, "proof", "proof", quads=PROOF_QUADS)
    same: Interval = yield from again(examiner, "proof", "proof")
    engine, note = yield from engine_speedup(climb)
    fault = climb.ledger.rows[2]
    assert fault.loss is not None
    return Proof(
        evidence=evidence(examiner, "proof"),
        refused=DIFFER.format(timed.same.different, timed.same.answers) if timed.same.different else "",
        tokens=timed.same.tokens,
        again=same,
        fault=fault.loss,
        fault_caught=fault.verdict == "caught",
        sharper=None,
        speedup=timed.ratio.interval.inverse(),
        cost=cost_ratio(goal, "original", timed.ratio),
        steady=timed.ratio.steady,
        peak=None,
        engine=engine,
        engine_note=note,
        perplexity=None,
        windows=None,
        worst=(),
        documents=(),
        same=timed.same,
    )
