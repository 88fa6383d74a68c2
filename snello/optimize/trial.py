"""One stage on trial: its model is made, its quality and cost are measured, and the gate gives its verdict."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from snello.measure.timing import Ratio
from snello.models.spec import Spec
from snello.optimize.candidate import Candidate, refused_for_quality
from snello.optimize.events import Event, Verdict
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.files import folder_bytes, sha256_file
from snello.optimize.gate import Judgement, judge_cost, judge_equal
from snello.optimize.journal import unit_key
from snello.optimize.receipts import Evidence
from snello.optimize.recipe import GOALS, Stage, Step
from snello.optimize.work import Answer, Report
from snello.techniques.base import Context

Run: TypeAlias = Generator[Event, None, Any]
MODEL_FILE = "model.safetensors"


def make(examiner: Examiner, artifacts: Path, stage: Stage, candidate: Candidate) -> Run:
    """Makes the candidate's model. A folder appears whole, so one that is there is finished."""
    for step in stage.steps:
        inputs = {
            "model": candidate.model.digest,
            "step": step.resolved(),
            "text": examiner.texts.sha256,
        }
        folder = artifacts / unit_key("artifact", {**examiner.worker.common, **inputs})
        unit = yield from examiner.worker.unit(
            stage.name, "apply", inputs, functools.partial(_make, examiner, step, candidate, folder)
        )
        if not folder.is_dir():  # dropped by a run with other wishes; the unit stays, the folder is made again
            _make(examiner, step, candidate, folder, lambda *_: None)
        candidate.model = examiner.bench.load(folder)
        candidate.artifact, candidate.artifact_sha256 = folder, unit.value["sha256"]
        candidate.prefixes = (*candidate.prefixes, candidate.model)


def _make(examiner: Examiner, step: Step, candidate: Candidate, folder: Path, report: Report) -> Answer:
    if not folder.is_dir():
        state = folder.with_name(f"{folder.name}.state")

        def progress(message: str, fraction: float) -> None:
            report("apply", round(1000 * min(max(fraction, 0.0), 1.0)), 1000, "share")

        context = Context(
            output=folder,
            windows=_windows(examiner, candidate),
            seed=examiner.request.seed,
            work_dir=state,
            progress=progress,
        )
        examiner.bench.apply(step, candidate.model, context)
        shutil.rmtree(state, ignore_errors=True)
    return {"sha256": sha256_file(folder / MODEL_FILE), "bytes": folder_bytes(folder)}, {}


def _windows(examiner: Examiner, candidate: Candidate) -> list[np.ndarray]:
    """The calibration text in the tokens of the model that the step is applied to."""
    rule, longest = examiner.rule(candidate), candidate.spec.max_positions
    if rule is None:
        return examiner.texts.calib
    return [rule.translate(window)[0][:longest] for window in examiner.texts.calib]


def judge(examiner: Examiner, candidate: Candidate, best: Candidate) -> Run:
    """Quality first, then cost; a recorded decision is taken as it is. The gain is None where costs are equal."""
    request, stage = examiner.request, candidate.name
    candidate.select = yield from examiner.read(candidate, "select", stage)
    assert examiner.original.select is not None
    evidence: Evidence = yield from examiner.evidence(
        candidate, candidate.select, examiner.original.select, "select", best, stage
    )
    candidate.evidence, candidate.loss = evidence, evidence.loss
    refused = refused_for_quality(request, candidate)
    candidate.speed = yield from examiner.speed(candidate, stage)
    candidate.sequences = yield from examiner.sequences(candidate, stage)
    recorded = _recorded(examiner, candidate.name)
    if costs_the_same(candidate.spec, best):  # the same program over the same bytes: there is nothing to time
        candidate.cost, candidate.peak, candidate.speedup = best.cost, best.peak, best.speedup
        assert evidence.increment is not None
        return recorded or refused or judge_equal(best.name, evidence.increment), None
    gain: Ratio = yield from examiner.ratio(best, candidate, request.goal, stage, quads=3 if refused else 12)
    candidate.costs = (cost_ratio(request.goal, best.name, gain),)
    candidate.cost = gain.b
    if request.goal == "memory":
        candidate.peak = int(max(peak for _, peak in gain.pairs))
    over = gain
    if not best.is_original:  # not composed of ratios that were measured minutes apart
        over = yield from examiner.ratio(examiner.original, candidate, request.goal, stage, quads=3)
        candidate.costs = (*candidate.costs, cost_ratio(request.goal, "original", over))
    candidate.speedup = over.interval.inverse()
    if recorded is not None:
        return recorded, gain
    if refused is not None:
        return refused, gain
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
