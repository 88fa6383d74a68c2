"""Controls of steps that train (law 10): what the same training gives the original, and whom a candidate must match.

Text improves a model that still had something to learn, pruned or not. So beside every step that trains stands the
original trained on the same tokens, schedule and seed, and a loss is taken against whichever reads the text best: the
original, a control, or a trained model earlier in the chain. What training gained is thereby never budget for a step
that loses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import numpy as np

from snello.measure import quality
from snello.measure.rulers import Reading
from snello.optimize.candidate import Candidate
from snello.optimize.events import Event
from snello.optimize.examine import Examiner, sources_of
from snello.optimize.make import make
from snello.optimize.receipts import ControlFacts, Evidence
from snello.optimize.recipe import Stage, Step
from snello.techniques.base import Trains

Run: TypeAlias = Generator[Event, None, Any]


def control_step(step: Step, examiner: Examiner) -> Step | None:
    """The step that makes the control of this one out of the original; None where nothing is trained, or nothing can
    be trained without the teacher.
    """
    technique = step.technique
    control = technique.control(examiner.original.spec) if isinstance(technique, Trains) else None
    if control is None:
        return None
    values = {field.name: getattr(control, field.name) for field in dataclasses.fields(control)}
    return Step(step.use, {name: value for name, value in values.items() if value is not None})


def against_the_better(examiner: Examiner, candidate: Candidate, evidence: Evidence, stage: str) -> Run:
    """The evidence with its loss against the best reader among those named above; unchanged where nothing trains."""
    rivals = list(_earlier(examiner, candidate))
    made = []
    for step in dict.fromkeys(_hashable(step) for step in candidate.steps):
        control = control_step(Step(step[0], dict(step[1])), examiner)
        if control is not None:
            made.append((yield from _control(examiner, control, stage)))
    if not made:
        return evidence
    blocks, cut = examiner.texts.blocks(evidence.cut), evidence.cut
    readings: dict[str, Reading] = {}
    for rival in (examiner.original, *made, *rivals):
        readings[rival.name] = yield from examiner.read(rival, cut, stage)
    own: Reading = yield from examiner.read(candidate, cut, stage)
    best = min(readings, key=lambda name: mean(readings[name]))
    found = quality.compare(examiner.ruler, readings[best], own, blocks, seed=examiner.seed)
    original = readings[examiner.original.name]
    facts = [
        ControlFacts(
            name=one.name,
            digest=one.digest,
            loss=quality.compare(examiner.ruler, original, readings[one.name], blocks, seed=examiner.seed).loss,
        )
        for one in made
    ]
    return dataclasses.replace(
        evidence,
        loss=found.loss,
        sources=sources_of(found),
        against=best,
        over_original=evidence.loss,
        controls=tuple(facts),
    )


def mean(reading: Reading) -> float:
    """Nats a token."""
    return float(np.concatenate(reading.values).mean(dtype=np.float64))


def _control(examiner: Examiner, step: Step, stage: str) -> Run:
    original = examiner.original
    name = f"original trained alike ({step.use})"
    control = Candidate(name=name, model=original.model, steps=(step,), prefixes=(original.model,))
    yield from make(examiner, Stage(stage, (step,)), control)
    return control


def _earlier(examiner: Examiner, candidate: Candidate) -> Iterator[Candidate]:
    """Models of the chain that a training step left, before its last step."""
    for number, step in enumerate(candidate.steps[:-1], start=1):
        if control_step(step, examiner) is not None:
            steps = candidate.steps[:number]
            yield Candidate(name=f"after {step.use}", model=candidate.prefixes[number], steps=steps)


def _hashable(step: Step) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return step.use, tuple(sorted(step.options.items()))
