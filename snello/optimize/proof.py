"""The proof: the text that nothing has seen is read once, by the original and by the lean model, and judged.

What the report shows besides the verdict is computed here too, so that it computes nothing: the ten worst passages,
losses by document, the Pareto front, what the chain would be without each of its stages.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from snello.measure import quality
from snello.measure.answers import Sameness
from snello.measure.interval import Interval
from snello.measure.rulers import Reading
from snello.measure.speed import Clock
from snello.measure.text import Block
from snello.measure.timing import Ratio, ratio
from snello.optimize.baseline import again
from snello.optimize.candidate import Candidate
from snello.optimize.climb import Climb
from snello.optimize.control import against_the_better
from snello.optimize.events import Event
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.gate import judge_quality
from snello.optimize.passages import document_losses, worst_passages
from snello.optimize.plain import revive
from snello.optimize.receipts import (
    CostRatio,
    DocumentLoss,
    Evidence,
    ParetoPoint,
    Passage,
    Perplexity,
)
from snello.optimize.work import Report

Run: TypeAlias = Generator[Event, None, Any]


@dataclass(frozen=True)
class Proof:
    """Everything that was found when the proof text was read."""

    evidence: Evidence
    refused: str  # why it is not proved; empty where it is
    tokens: int
    again: Interval
    fault: Interval
    fault_caught: bool
    sharper: float | None
    speedup: Interval
    cost: CostRatio
    steady: bool
    peak: int | None  # the most resident bytes of any run, where the goal is memory
    engine: Interval | None
    engine_note: str
    perplexity: Perplexity | None
    windows: dict[str, Any] | None  # what `verify.py` reads: decoders with the original's vocabulary
    worst: tuple[Passage, ...]
    documents: tuple[DocumentLoss, ...]
    same: Sameness | None = None  # of a pair's answers and the original's

    @property
    def proved(self) -> bool:
        return not self.refused


def prove(climb: Climb) -> Run:
    """Reads the proof text and judges the best candidate on it."""
    examiner, request = climb.examiner, climb.request
    blocks = examiner.texts.blocks("proof")
    original = yield from examiner.read(climb.original, "proof", "proof")
    lean = yield from examiner.read(climb.best, "proof", "proof")
    evidence: Evidence = yield from examiner.evidence(climb.best, lean, original, "proof", None, "proof")
    evidence = yield from against_the_better(examiner, climb.best, evidence, "proof")
    refused = judge_quality(
        evidence.loss,
        request.max_loss,
        strict_failures=evidence.guards.failed if request.strict else (),
        metric=evidence.metric,
    )
    same = yield from again(examiner, "proof", "proof")
    fault = _fault(climb, original, blocks)
    timed: Ratio = yield from examiner.ratio(climb.original, climb.best, request.goal, "proof", quads=10)
    engine, note = yield from engine_speedup(climb)
    return Proof(
        evidence=evidence,
        refused="" if refused is None else refused.reason,
        tokens=sum(source.tokens for source in evidence.sources),
        again=same,
        fault=fault,
        fault_caught=judge_quality(fault, request.max_loss) is not None,
        sharper=quality.sharpness(examiner.ruler, original, lean, blocks, seed=request.seed),
        speedup=timed.interval.inverse(),
        cost=cost_ratio(request.goal, "original", timed),
        steady=timed.steady,
        peak=int(max(most for _, most in timed.pairs)) if request.goal == "memory" else None,
        engine=engine,
        engine_note=note,
        perplexity=perplexity(examiner, evidence, original, lean, blocks),
        windows=windows(examiner, evidence, original, lean, blocks) if examiner.rule(climb.best) is None else None,
        worst=worst_passages(examiner.ruler, climb.original.model, original, lean, blocks),
        documents=document_losses(examiner.ruler, original, lean, blocks),
    )


def _fault(climb: Climb, original: Reading, blocks: Sequence[Block]) -> Interval:
    ruler, request = climb.examiner.ruler, climb.request
    fault = quality.plant(ruler, original, blocks, max_loss=request.max_loss, seed=request.seed + 1)
    return quality.compare(ruler, original, fault, blocks, seed=request.seed).loss


def engine_speedup(climb: Climb) -> Run:
    """Our original over Transformers, on the same workload in turn; None and the reason where it is not measured."""
    examiner = climb.examiner
    if climb.request.goal != "latency":
        return None, f"measured for latency only, not for {climb.request.goal}"
    if examiner.worker.left_seconds < 60:
        return None, "no time left in the budget"
    work = examiner.workload

    def measure(report: Report) -> Any:
        peer = examiner.bench.transformers(climb.original.model, work.prompt, work.generate)
        if isinstance(peer, str):
            return peer, {}
        clock = Clock(examiner.runners(climb.original), work, seed=examiner.seed)
        return ratio(peer, clock.latency, most_quads=5), {}

    inputs = {"model": climb.original.digest, "workload": str(work), "machine": str(examiner.machine.cpu)}
    unit = yield from examiner.worker.unit("proof", "engine", inputs, measure)
    if isinstance(unit.value, str):
        return None, unit.value
    found: Ratio = revive(Ratio, unit.value)
    if not found.steady:
        return None, "too noisy to say"
    return found.interval.inverse(), ""


# ---- what others need to recompute it ----


def perplexity(
    examiner: Examiner, evidence: Evidence, original: Reading, lean: Reading, blocks: Sequence[Block]
) -> Perplexity | None:
    """Of both models on the source whose loss decided."""
    if not examiner.original.spec.causal:
        return None
    source = _decisive(evidence)
    chosen = [number for number, block in enumerate(blocks) if block.source == source]
    means = [float(np.concatenate([r.values[i] for i in chosen]).mean(dtype=np.float64)) for r in (original, lean)]
    return Perplexity(source=source, original=float(np.exp(means[0])), lean=float(np.exp(means[1])))


def windows(
    examiner: Examiner, evidence: Evidence, original: Reading, lean: Reading, blocks: Sequence[Block]
) -> dict[str, Any] | None:
    """The token windows of the text that decided, from where each is scored, and the loss on it over the original:
    whoever checks has no control at hand.
    """
    if not examiner.original.spec.causal:
        return None
    chosen = [block for block in blocks if block.source == _decisive(evidence)]
    found = quality.compare(examiner.ruler, original, lean, blocks, seed=examiner.seed)
    loss = next(source.loss for source in found.sources if source.source == _decisive(evidence))
    return {
        "windows": [block.tokens.tolist() for block in chosen],
        "scored_from": [block.scored_from for block in chosen],
        "loss": loss.mid,
        "loss_high": loss.high,
    }


def _decisive(evidence: Evidence) -> str:
    return max(evidence.sources, key=lambda source: source.loss.high).source


# ---- what the report shows ----


def pareto(climb: Climb) -> tuple[ParetoPoint, ...]:
    """All that was measured, with who is beaten by nobody and who cannot be told apart by loss."""
    everyone = [climb.original, *climb.judged]
    ties = {(a, b) for a in range(len(everyone)) for b in range(a) if _tied(climb, everyone[a], everyone[b])}
    verdicts = {row.name: row.verdict for row in climb.ledger.rows}
    points = []
    for number, one in enumerate(everyone):
        better = [other for other in everyone if _beats(other, one)]
        points.append(
            ParetoPoint(
                name=one.name,
                speedup=one.speedup,
                loss=one.loss,
                weights_bytes=next((row.weights_bytes or 0 for row in climb.ledger.rows if row.name == one.name), 0),
                verdict=verdicts.get(one.name, "original"),
                on_front=not better,
                tied_with=tuple(
                    other.name for rank, other in enumerate(everyone) if (max(rank, number), min(rank, number)) in ties
                ),
            )
        )
    return tuple(points)


def _beats(other: Candidate, one: Candidate) -> bool:
    """At least as good both ways, and better in one."""
    ahead = other.speedup.mid - one.speedup.mid, one.loss.high - other.loss.high
    return min(ahead) >= 0 and max(ahead) > 0


def _tied(climb: Climb, one: Candidate, other: Candidate) -> bool:
    """The paired difference of the two includes zero."""
    if one.select is None or other.select is None:
        return False
    examiner = climb.examiner
    blocks = examiner.texts.blocks("select")
    found = quality.compare(examiner.ruler, one.select, other.select, blocks, seed=climb.request.seed).loss
    return found.low <= 0 <= found.high
