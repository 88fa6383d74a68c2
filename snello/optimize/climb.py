"""The ladder: baseline, the instrument's own checks, then stage after stage, each judged against the best so far.

A stage is applied to the best model (or replaces the end of its chain where it uses the same technique again),
measured, and kept or dropped. Alternatives stand in one list; the best so far is carried on, and only a candidate that
pays over it, or loses less at the same cost, takes its place.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from snello.errors import SnelloError, Unsupported
from snello.measure.interval import Interval
from snello.measure.quality import Power
from snello.measure.rulers import Reading
from snello.measure.sizes import weights_bytes
from snello.optimize.baseline import first_rows
from snello.optimize.candidate import Candidate
from snello.optimize.events import (
    Event,
    LadderRow,
    Planned,
    PlannedStage,
    StageJudged,
    StageStarted,
    TextSource,
    Warned,
)
from snello.optimize.examine import Examiner
from snello.optimize.files import folder_bytes
from snello.optimize.journal import Journal, Unit, unit_key
from snello.optimize.ledger import Ledger
from snello.optimize.make import make
from snello.optimize.plain import revive
from snello.optimize.planner import (
    Forecast,
    Goals,
    Prospect,
    cache_stage,
    default_stages,
    forecast_for,
    prospect,
    why_not_run,
)
from snello.optimize.receipts import StepReceipt
from snello.optimize.recipe import Stage, Step
from snello.optimize.trial import costs_the_same, judge

Run: TypeAlias = Generator[Event, None, Any]
TOO_LONG = "needs about"


class Climb:
    """The state of one run's ladder: rows, receipts, the best so far."""

    def __init__(
        self,
        examiner: Examiner,
        journal: Journal,
        *,
        power: Power | None,
        fault: Reading | None,
        sources: tuple[TextSource, ...],
    ) -> None:
        self.examiner = examiner
        self.request = examiner.request
        self.journal = journal
        self.power, self.fault, self.sources = power, fault, sources
        self.original = self.best = examiner.original
        self.ledger = Ledger(examiner)
        self.judged: list[Candidate] = []  # everything that was really made and read
        self.planned: Planned | None = None
        self.proof_seconds = 0.0

    @property
    def worker(self) -> Any:
        return self.examiner.worker

    # ---- from the bottom

    def events(self) -> Iterator[Event]:
        goals = Goals(self.request.goal, self.examiner.machine, self.examiner.workload)
        assert self.fault is not None
        first = yield from first_rows(self.examiner, self.ledger, self.fault)
        tokens = sum(source.tokens("select") for source in self.examiner.texts.sources)
        speed = self.original.speed.prefill_tokens_per_second.mid if self.original.speed else None
        run_seconds = self.original.cost if self.request.goal == "latency" else None
        forecast = forecast_for(self.original.spec, goals, tokens, speed, run_seconds)
        proof_tokens = sum(source.tokens("proof") for source in self.examiner.texts.sources)
        self.proof_seconds = forecast.proof(proof_tokens)
        self.planned = self.plan(goals, forecast)
        yield self.planned
        yield from self._preflight(self.planned)
        for row in first:
            yield self.ledger.judged(row, self.best)
        for stage in self.stages():
            yield from self._stage(stage, goals, forecast)
        if self._searches and (extra := cache_stage(self.original.spec, self.best.steps)) is not None:
            yield from self._stage(extra, goals, forecast)

    @property
    def _searches(self) -> bool:
        """Without a recipe there is the fixed list, and at its end a stage that depends on what was kept."""
        return not self.request.recipe.stages and self.request.recipe.replay is None

    def stages(self) -> tuple[Stage, ...]:
        recipe = self.request.recipe
        if recipe.stages or recipe.replay is not None:
            return recipe.stages
        return default_stages(self.original.spec)

    def plan(self, goals: Goals, forecast: Forecast) -> Planned:
        """What will be tried, at what predicted cost."""
        original = self.original.spec
        planned: list[PlannedStage] = []
        stages = list(self.stages())
        if self._searches and (extra := cache_stage(original, self.best.steps)) is not None:
            stages.append(extra)
        for stage in stages:
            found = prospect(stage, original, original, goals, self.examiner.bench.plan)
            reason = why_not_run(found, original, "original", self.original.cost, goals)
            planned.append(
                PlannedStage(
                    name=stage.name,
                    steps=tuple(step.resolved() for step in stage.steps),
                    predicted_speedup=found.speedup,
                    predicted_bytes=found.bytes,
                    predicted_seconds=0.0 if reason else forecast.stage(stage, found.speedup),
                    runs=not reason,
                    reason=reason,
                )
            )
        largest = max((stage.predicted_bytes for stage in planned if stage.runs), default=0)
        total = sum(stage.predicted_bytes for stage in planned if stage.runs)
        bench, own = self.examiner.bench, weights_bytes(original)
        return Planned(
            stages=tuple(planned),
            predicted_seconds=sum(stage.predicted_seconds for stage in planned) + self.proof_seconds,
            time_budget_seconds=self.request.time_budget,
            memory_bytes=own + 2 * largest + 2_000_000_000 * (own > 200_000_000) + 400_000_000,
            memory_available_bytes=bench.free_memory(),
            disk_bytes=max(0, total - folder_bytes(self.journal.artifacts)),  # a resumed run has made some
            disk_available_bytes=bench.free_disk(self.request.output.parent),
        )

    def _preflight(self, plan: Planned) -> Iterator[Event]:
        if plan.disk_bytes > plan.disk_available_bytes:
            needed, free = _bytes(plan.disk_bytes), _bytes(plan.disk_available_bytes)
            message = f"the stages need {needed} of disk and {free} are free"
            raise SnelloError(message, "free some, or use --output on another disk")
        if plan.memory_bytes > plan.memory_available_bytes:
            needed, free = _bytes(plan.memory_bytes), _bytes(plan.memory_available_bytes)
            yield Warned(message=f"the plan may need {needed} of memory and {free} are free")
        if plan.predicted_seconds > plan.time_budget_seconds:
            minutes, allowed = plan.predicted_seconds / 60, plan.time_budget_seconds / 60
            message = f"all stages would take about {minutes:.0f} min; later ones may not start within {allowed:.0f}"
            yield Warned(message=message, hint=f"--time-budget {math.ceil(minutes)}m")

    # ---- one stage

    def _stage(self, stage: Stage, goals: Goals, forecast: Forecast) -> Iterator[Event]:
        index = self.ledger.next_index
        base_model, kept, prefixes = self.best.base_for(stage.steps)
        found = prospect(stage, base_model.spec, self.original.spec, goals, self.examiner.bench.plan)
        steps = (*kept, *stage.steps)
        equal = found.spec is not None and costs_the_same(found.spec, self.best)
        predicted = forecast.stage(stage, found.speedup, timed=not equal)
        inputs = self._stage_inputs(stage)
        known = self.worker.known("stage", inputs)
        reason = ""
        if known is None and equal and same_steps(steps, self.best.steps):
            reason = f"same as {self.best.name}"
        elif known is None:
            reserved = self._reserve(steps, goals, forecast) if equal else 0.0
            reason = self._why_not(found, goals, predicted, reserved, equal=equal)
        if reason:
            yield self._not_run(index, stage, reason)
            return
        candidate = Candidate(name=stage.name, model=base_model, steps=steps, prefixes=prefixes)
        candidate.applied_to = "original" if not kept else self.best.name
        if known is None:
            yield StageStarted(index=index, stage=stage.name, predicted_seconds=predicted)
            try:
                known = yield from self._run_stage(stage, candidate, index, inputs)
            except Unsupported as error:
                yield self._not_run(index, stage, error.message)
                return
        forecast.learn(predicted, known.seconds)
        yield self._take(candidate, known, resumed=candidate.select is None)

    def _stage_inputs(self, stage: Stage) -> dict[str, Any]:
        """Everything that a stage's verdict depends on."""
        request, examiner = self.request, self.examiner
        wishes = (request.max_loss, request.goal, request.strict, request.metric)
        recorded = request.recipe.replay.decisions if request.recipe.replay is not None else None
        return {
            "stage": stage.name,
            "steps": [step.resolved() for step in stage.steps],
            "best": self.best.digest,
            "text": examiner.texts.sha256,
            "wishes": wishes,
            "recorded": recorded,
            "machine": examiner.machine.cpu,
        }

    def _run_stage(self, stage: Stage, candidate: Candidate, index: int, inputs: dict[str, Any]) -> Run:
        """Makes, measures and judges. The outcome is journaled as one unit; only then does a dropped folder go."""
        before = self.worker.finished_seconds
        yield from make(self.examiner, stage, candidate)
        judgement, gain = yield from judge(self.examiner, candidate, self.best)
        candidate.seconds = self.worker.finished_seconds - before
        row = self.ledger.stage_row(index, candidate, self.best, judgement, gain)
        receipt = self.ledger.receipt(row, candidate, stage, judgement.margin)
        assert candidate.select is not None
        outcome = {
            "row": row,
            "receipt": receipt,
            "speedup": candidate.speedup,
            "cost": candidate.cost,
            "folders": [
                Path(model.path).name for model in candidate.prefixes[len(candidate.prefixes) - len(stage.steps) :]
            ],
        }
        key = unit_key("stage", {**self.worker.common, **inputs})
        self.journal.keep(key, Unit("stage", outcome, candidate.seconds, candidate.select.save()))
        if judgement.verdict != "kept":
            self._forget(candidate)
        unit = self.journal.recall(key)
        assert unit is not None
        return unit

    def _take(self, candidate: Candidate, known: Unit, *, resumed: bool) -> StageJudged:
        """A judged stage, fresh or from the journal, into the ladder."""
        if resumed:
            self.worker.finished_seconds += known.seconds
        row: LadderRow = revive(LadderRow, known.value["row"])
        receipt: StepReceipt = revive(StepReceipt, known.value["receipt"])
        candidate.select = Reading.load(dict(known.arrays))
        candidate.loss = row.loss or Interval.exact(0.0)
        candidate.speedup = revive(Interval, known.value["speedup"])
        candidate.cost, candidate.seconds = known.value["cost"], known.seconds
        candidate.evidence, candidate.speed, candidate.costs = receipt.evidence, receipt.speed, receipt.costs
        candidate.artifact_sha256 = receipt.artifact_sha256
        self.ledger.receipts.append(receipt)
        self.judged.append(candidate)
        if row.verdict == "kept":
            if resumed:
                self._reload(candidate, known.value["folders"])
            self.best = candidate
        return self.ledger.judged(row, self.best, resumed=resumed)

    def _reload(self, candidate: Candidate, folders: list[str]) -> None:
        """The models that a kept stage left in the work folder."""
        for name in folders:
            folder = self.journal.artifacts / name
            candidate.model = self.examiner.bench.load(folder)
            candidate.prefixes = (*candidate.prefixes, candidate.model)
            candidate.artifact = folder

    def _why_not(self, found: Prospect, goals: Goals, predicted: float, reserved: float, *, equal: bool) -> str:
        """`reserved`: seconds that others get first."""
        replay = self.request.recipe.replay
        if replay is not None:
            return found.reason
        reason = "" if equal else why_not_run(found, self.best.spec, self.best.name, self.best.cost, goals)
        left = self.worker.left_seconds - self.proof_seconds - reserved
        if not reason and predicted > left:
            return f"{TOO_LONG} {in_words(predicted)}, {in_words(max(0.0, left))} left"
        return reason

    def _reserve(self, steps: Sequence[Step], goals: Goals, forecast: Forecast) -> float:
        """Seconds for the INT8 cache on top of these steps, which may still pay where an equal cost cannot."""
        extra = cache_stage(self.original.spec, steps) if self._searches else None
        if extra is None:
            return 0.0
        original = self.original.spec
        found = prospect(extra, original, original, goals, self.examiner.bench.plan)
        could_pay = not why_not_run(found, self.best.spec, self.best.name, self.best.cost, goals)
        return forecast.stage(extra, found.speedup) if could_pay else 0.0

    # ---- bookkeeping

    def _forget(self, candidate: Candidate) -> None:
        """A dropped artefact is not needed again, and disk is."""
        self.examiner.runners.drop(candidate)
        kept = {Path(model.path) for model in self.best.prefixes}
        if candidate.artifact is not None and candidate.artifact not in kept:
            shutil.rmtree(candidate.artifact, ignore_errors=True)

    def _not_run(self, index: int, stage: Stage, reason: str) -> StageJudged:
        row = LadderRow(index=index, name=stage.name, kind="stage", verdict="not run", reason=reason)
        self.ledger.receipts.append(self.ledger.receipt(row, None, stage))
        return self.ledger.judged(row, self.best)


def same_steps(one: Sequence[Step], other: Sequence[Step]) -> bool:
    return [step.resolved() for step in one] == [step.resolved() for step in other]


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def in_words(seconds: float) -> str:
    """ "80 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
