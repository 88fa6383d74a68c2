"""Before the first stage: what will be tried at what predicted cost, and whether disk, memory and time suffice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from snello.errors import SnelloError
from snello.measure.sizes import weights_bytes
from snello.optimize.events import Event, Goal, Planned, PlannedStage, Warned
from snello.optimize.files import folder_bytes
from snello.optimize.planner import prospect, why_not_run
from snello.optimize.proposals import PHASES, cache_stage, stage_of
from snello.optimize.recipe import Stage

if TYPE_CHECKING:
    from snello.optimize.climb import Climb

CHAINS = "tried where what was measured of their steps says that they may pay"


def plan(climb: Climb) -> Planned:
    """Every stage alone. Which chains are worth it is not known before their parts are measured."""
    planned = [_planned(climb, stage) for stage in _stages(climb)]
    largest = max((stage.predicted_bytes for stage in planned if stage.runs), default=0)
    total = sum(stage.predicted_bytes for stage in planned if stage.runs)
    bench, own = climb.examiner.bench, weights_bytes(climb.original.spec)
    if climb.searches:
        planned.append(_chains(climb, planned))
    return Planned(
        stages=tuple(planned),
        predicted_seconds=sum(stage.predicted_seconds for stage in planned) + climb.proof_seconds,
        time_budget_seconds=climb.request.time_budget,
        memory_bytes=own + 2 * largest + 2_000_000_000 * (own > 200_000_000) + 400_000_000,
        memory_available_bytes=bench.free_memory(),
        disk_bytes=max(0, total - folder_bytes(climb.journal.artifacts)),  # a resumed run has made some
        disk_available_bytes=bench.free_disk(climb.request.output.parent),
        goal=cast(Goal, climb.request.goal),
    )


def _stages(climb: Climb) -> Sequence[Stage]:
    if not climb.searches:
        return climb.stages
    stages = [stage_of((), "", offer) for phase in PHASES for offer in phase(climb.subject)]
    extra = cache_stage(climb.original.spec, ())
    return [*stages, extra] if extra is not None else stages


def _planned(climb: Climb, stage: Stage) -> PlannedStage:
    original = climb.original.spec
    found = prospect(stage, original, original, climb.goals, climb.examiner.bench.plan)
    reason = why_not_run(found, original, "original", climb.original.cost, climb.goals)
    return PlannedStage(
        name=stage.name,
        steps=tuple(step.resolved() for step in stage.steps),
        predicted_speedup=found.speedup,
        predicted_bytes=found.bytes,
        predicted_seconds=0.0 if reason else climb.forecast.stage(stage, found.speedup),
        runs=not reason,
        reason=reason,
    )


def _chains(climb: Climb, planned: Sequence[PlannedStage]) -> PlannedStage:
    """One line for all of them, with the best speed-up that two runnable stages promise together."""
    best: dict[str, float] = {}
    for stage in planned:
        if stage.runs:
            use = str(stage.steps[-1]["use"])
            best[use] = max(best.get(use, 1.0), stage.predicted_speedup)
    return PlannedStage(
        name="chains",
        steps=(),
        predicted_speedup=math.prod(best.values()),
        predicted_bytes=0,
        predicted_seconds=0.0,
        runs=False,
        reason=CHAINS,
    )


def preflight(found: Planned) -> Iterator[Event]:
    """Refuses what cannot fit; warns of what may not."""
    if found.disk_bytes > found.disk_available_bytes:
        needed, free = _bytes(found.disk_bytes), _bytes(found.disk_available_bytes)
        message = f"the stages need {needed} of disk and {free} are free"
        raise SnelloError(message, "free some, or use --output on another disk")
    if found.memory_bytes > found.memory_available_bytes:
        needed, free = _bytes(found.memory_bytes), _bytes(found.memory_available_bytes)
        yield Warned(message=f"the plan may need {needed} of memory and {free} are free")
    if found.predicted_seconds > found.time_budget_seconds:
        minutes, allowed = found.predicted_seconds / 60, found.time_budget_seconds / 60
        message = f"all stages would take about {minutes:.0f} min; later ones may not start within {allowed:.0f}"
        yield Warned(message=message, hint=f"--time-budget {math.ceil(minutes)}m")


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
