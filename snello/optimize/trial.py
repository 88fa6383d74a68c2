"""One stage on trial: its quality and cost are measured, and the gate gives its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, TypeAlias

from snello.measure.timing import Ratio
from snello.models.spec import Spec
from snello.optimize.candidate import Candidate, refused_for_quality
from snello.optimize.control import against_the_better
from snello.optimize.events import Event, Verdict
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.gate import PAYS, Judgement, judge_cost, judge_equal
from snello.optimize.receipts import Evidence
from snello.optimize.recipe import GOALS

Run: TypeAlias = Generator[Event, None, Any]


def judge(examiner: Examiner, candidate: Candidate, best: Candidate) -> Run:
    """Quality first, then cost; a recorded decision is taken as it is.

    The gain over the best is None where costs are equal, and where quality has decided: that stage is timed over the
    original alone, in few runs.
    """
    request, stage = examiner.request, candidate.name
    candidate.select = yield from examiner.read(candidate, "select", stage)
    assert examiner.original.select is not None
    evidence: Evidence = yield from examiner.evidence(
        candidate, candidate.select, examiner.original.select, "select", best, stage
    )
    evidence = yield from against_the_better(examiner, candidate, evidence, stage)
    candidate.evidence, candidate.loss = evidence, evidence.loss
    refused = refused_for_quality(request, candidate)
    candidate.speed = yield from examiner.speed(candidate, stage)
    candidate.sequences = yield from examiner.sequences(candidate, stage)
    recorded = _recorded(examiner, candidate.name)
    if costs_the_same(candidate.spec, best):  # the same program over the same bytes: there is nothing to time
        candidate.cost, candidate.peak, candidate.speedup = best.cost, best.peak, best.speedup
        assert evidence.increment is not None
        return recorded or refused or judge_equal(best.name, evidence.increment), None
    decided = recorded is None and refused is not None
    gain: Ratio | None = None
    if not decided:
        gain = yield from examiner.ratio(best, candidate, request.goal, stage, threshold=PAYS)
        candidate.costs = (cost_ratio(request.goal, best.name, gain),)
    over = gain
    if over is None or not best.is_original:  # not composed of ratios that were measured minutes apart
        over = yield from examiner.ratio(examiner.original, candidate, request.goal, stage, quads=3)
        candidate.costs = (*candidate.costs, cost_ratio(request.goal, "original", over))
    latest = gain or over
    candidate.cost, candidate.speedup = latest.b, over.interval.inverse()
    if request.goal == "memory":
        candidate.peak = int(max(peak for _, peak in latest.pairs))
    if decided:
        return refused, None
    assert gain is not None
    if recorded is not None:
        return recorded, gain
    others = yield from _other_costs(examiner, candidate, stage)
    return judge_cost(request.goal, gain, others), gain


def costs_the_same(spec: Spec, best: Candidate) -> bool:
    """Whether a model of this spec is run exactly as the best so far is, the original excepted."""
    return not best.is_original and spec.digest == best.spec.digest


def _recorded(examiner: Examiner, name: str) -> Judgement | None:
    replay = examiner.request.recipe.replay
    if replay is None:
        return None
    found = [decision for decision in replay.decisions if decision["stage"] == name]
    verdict: Verdict = "kept"
    if found and found[-1]["verdict"] != "kept":
        verdict = "dropped"
    return Judgement(verdict, "as recorded" if verdict == "kept" else f"as recorded: {found[-1]['reason']}")


def _other_costs(examiner: Examiner, candidate: Candidate, stage: str) -> Run:
    """The goals that were not asked for, coarsely, over the original; what cannot be measured is left out."""
    others: dict[str, float] = {}
    for goal in GOALS:
        if goal == examiner.request.goal or (goal != "memory" and not candidate.spec.causal):
            continue
        found: Ratio | None = yield from examiner.ratio(examiner.original, candidate, goal, stage, coarse=True)
        if found is not None:
            others[goal] = found.interval.mid
            candidate.costs = (*candidate.costs, cost_ratio(goal, "original", found))
            if goal == "memory" and candidate.speed is not None:
                candidate.speed = dataclasses.replace(candidate.speed, peak_resident_bytes=int(found.b))
            if goal == "throughput" and candidate.speed is not None:
                candidate.speed = dataclasses.replace(candidate.speed, throughput_tokens_per_second=1 / found.b)
    return others
