"""The ladder: baseline, the instrument's own checks, then stage after stage, each judged against the best so far.

A stage is applied to the best model (or replaces the end of its chain where it uses the same technique again),
measured, and kept or dropped. Alternatives stand in one list; the best so far is carried on, and only a candidate that
pays over it takes its place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from snello.errors import SnelloError, Unsupported
from snello.measure import quality
from snello.measure.interval import Interval
from snello.measure.quality import Power
from snello.measure.rulers import Reading
from snello.measure.sizes import weights_bytes
from snello.measure.timing import Ratio
from snello.optimize.candidate import Candidate, facts
from snello.optimize.events import (
    Event,
    LadderRow,
    Planned,
    PlannedStage,
    StageJudged,
    StageStarted,
    TextSource,
    Verdict,
    Warned,
)
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.files import folder_bytes, sha256_file
from snello.optimize.gate import Judgement, judge_cost, judge_quality
from snello.optimize.journal import Journal, Unit, unit_key
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
from snello.optimize.receipts import CostRatio, Evidence, Guards, StepReceipt, revive
from snello.optimize.recipe import GOALS, Stage, Step
from snello.optimize.work import Answer, Report
from snello.techniques.base import Context

Run: TypeAlias = Generator[Event, None, Any]
MODEL_FILE = "model.safetensors"
AGAIN_BLOCKS = 16


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
        self.rows: list[LadderRow] = []
        self._pending: list[LadderRow] = []
        self.receipts: list[StepReceipt] = []
        self.judged: list[Candidate] = []  # everything that was really made and read
        self.planned: Planned | None = None
        self.again = Interval.exact(0.0)
        self.fault_loss: Interval | None = None
        self.fault_caught = False
        self.versions = examiner.bench.versions()
        self.proof_seconds = 0.0

    @property
    def worker(self) -> Any:
        return self.examiner.worker

    # ---- from the bottom

    def events(self) -> Iterator[Event]:
        goals = Goals(self.request.goal, self.examiner.machine, self.examiner.workload)
        yield from self._baseline()
        tokens = sum(source.tokens("select") for source in self.examiner.texts.sources)
        speed = self.original.speed.prefill_tokens_per_second.mid if self.original.speed else None
        run_seconds = self.original.cost if self.request.goal == "latency" else None
        forecast = forecast_for(self.original.spec, goals, tokens, speed, run_seconds)
        proof_tokens = sum(source.tokens("proof") for source in self.examiner.texts.sources)
        self.proof_seconds = forecast.proof(proof_tokens)
        self.planned = self.plan(goals, forecast)
        yield self.planned
        yield from self._preflight(self.planned)
        for row in self._pending:
            yield self._judged(row)
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
            disk_bytes=total,
            disk_available_bytes=bench.free_disk(self.request.output.parent),
        )

    def _preflight(self, plan: Planned) -> Iterator[Event]:
        if plan.disk_bytes > plan.disk_available_bytes:
            needed, free = plan.disk_bytes / 1e9, plan.disk_available_bytes / 1e9
            message = f"the stages need {needed:.1f} GB of disk and {free:.1f} GB are free"
            raise SnelloError(message, "free some, or use --output on another disk")
        if plan.memory_bytes > plan.memory_available_bytes:
            needed, free = plan.memory_bytes / 1e9, plan.memory_available_bytes / 1e9
            yield Warned(message=f"the plan may need {needed:.1f} GB of memory and {free:.1f} GB are free")
        if plan.predicted_seconds > plan.time_budget_seconds:
            needed, allowed = plan.predicted_seconds / 60, plan.time_budget_seconds / 60
            message = f"all stages would take about {needed:.0f} min; later ones may not start within {allowed:.0f}"
            yield Warned(message=message, hint=f"--time-budget {math.ceil(needed)}m")

    # ---- the first three rows

    def _baseline(self) -> Run:
        """The original's own speed and habits, the original again, and the planted fault."""
        original, examiner = self.original, self.examiner
        original.speed = yield from examiner.speed(original, "original")
        if original.spec.causal:
            original.habits = yield from examiner.habits(original, "original")
        own = examiner.runners(original).weights_bytes
        row = LadderRow(index=1, name="original", kind="original", verdict="original", reason="", weights_bytes=own)
        self._pending = [row]
        self.receipts.append(self._receipt(row, original, None, {}))
        yield StageStarted(index=2, stage="original again", predicted_seconds=0.0)
        self._pending.append((yield from self._again(own)))
        self._pending.append(self._planted())

    def _again(self, own: int) -> Run:
        """The original against itself: its loss must be exactly zero and its speed the same."""
        examiner, original = self.examiner, self.original
        assert original.select is not None
        blocks = examiner.texts.blocks("select")[:AGAIN_BLOCKS]
        inputs = {"model": original.digest, "text": examiner.texts.sha256, "again": len(blocks)}

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report("score", done, total, "window")

            return None, examiner.ruler.read(examiner.runners(original), blocks, step).save()

        unit = yield from self.worker.unit("original again", "again", inputs, work)
        first = Reading(original.select.values[: len(blocks)])
        second = Reading.load(dict(unit.arrays))
        self.again = quality.compare(examiner.ruler, first, second, blocks, seed=self.request.seed).loss
        timed: Ratio | None = yield from examiner.ratio(
            original, original, self.request.goal, "original again", quads=4
        )
        if timed is None:
            hint = f"choose another goal: {', '.join(goal for goal in GOALS if goal != self.request.goal)}"
            raise Unsupported(f"the goal {self.request.goal} cannot be measured for this model here", hint)
        original.cost = timed.a
        steady = self.again == Interval.exact(0.0) and timed.steady
        row = LadderRow(
            index=2,
            name="original again (A/A)",
            kind="again",
            verdict="steady" if steady else "unsteady",
            reason="instrument steady" if steady else self._unsteady(timed),
            loss=self.again,
            speedup=timed.interval.inverse(),
            weights_bytes=own,
            seconds=unit.seconds,
        )
        costs = (cost_ratio(self.request.goal, "original", timed),)
        self.receipts.append(self._receipt(row, original, None, {}, costs=costs))
        return row

    def _unsteady(self, timed: Ratio) -> str:
        if self.again != Interval.exact(0.0):
            return "the same model gave other numbers"
        return f"timing is noisy: known to {100 * timed.interval.half_width:.1f}%, wanted 1.5%"

    def _planted(self) -> LadderRow:
        """A damaged reading, 1.1 times over the budget, must be refused by the same judge."""
        examiner = self.examiner
        assert self.fault is not None and self.original.select is not None
        blocks = examiner.texts.blocks("select")
        found = quality.compare(examiner.ruler, self.original.select, self.fault, blocks, seed=self.request.seed)
        self.fault_loss = found.loss
        self.fault_caught = judge_quality(found.loss, self.request.max_loss) is not None
        row = LadderRow(
            index=3,
            name="planted fault",
            kind="fault",
            verdict="caught" if self.fault_caught else "not caught",
            reason=f"made {quality.FAULT} times the budget",
            loss=found.loss,
        )
        self.receipts.append(self._receipt(row, None, None, {}))
        return row

    # ---- one stage

    def _stage(self, stage: Stage, goals: Goals, forecast: Forecast) -> Iterator[Event]:
        index = len(self.receipts) + 1
        base_model, kept, prefixes = self.best.base_for(stage.steps)
        found = prospect(stage, base_model.spec, self.original.spec, goals, self.examiner.bench.plan)
        predicted = forecast.stage(stage, found.speedup)
        inputs = self._stage_inputs(stage)
        known = self.worker.known("stage", inputs)
        reason = self._why_not(found, goals, predicted) if known is None else ""
        if reason:
            yield self._not_run(index, stage, reason)
            return
        candidate = Candidate(name=stage.name, model=base_model, steps=(*kept, *stage.steps), prefixes=prefixes)
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
        yield from self._apply(stage, candidate)
        judgement, gain = yield from self._judge(candidate)
        candidate.seconds = self.worker.finished_seconds - before
        row = self._row(index, candidate, judgement, gain)
        receipt = self._receipt(row, candidate, stage, stage.steps[-1].resolved(), judgement.margin)
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
        self.receipts.append(receipt)
        self.judged.append(candidate)
        if row.verdict == "kept":
            if resumed:
                self._reload(candidate, known.value["folders"])
            self.best = candidate
        return self._judged(row, resumed=resumed)

    def _reload(self, candidate: Candidate, folders: list[str]) -> None:
        """The models that a kept stage left in the work folder."""
        for name in folders:
            folder = self.journal.artifacts / name
            candidate.model = self.examiner.bench.load(folder)
            candidate.prefixes = (*candidate.prefixes, candidate.model)
            candidate.artifact = folder

    def _why_not(self, found: Prospect, goals: Goals, predicted: float) -> str:
        replay = self.request.recipe.replay
        if replay is not None:
            return found.reason
        reason = why_not_run(found, self.best.spec, self.best.name, self.best.cost, goals)
        left = self.worker.left_seconds - self.proof_seconds
        if not reason and predicted > left:
            return f"needs about {_minutes(predicted)}, {_minutes(max(0.0, left))} left"
        return reason

    def _apply(self, stage: Stage, candidate: Candidate) -> Run:
        """Makes the candidate's model. A folder appears whole, so one that is there is finished."""
        for step in stage.steps:
            inputs = {
                "model": candidate.model.digest,
                "step": step.resolved(),
                "text": self.examiner.texts.sha256,
            }
            folder = self.journal.artifacts / unit_key("artifact", {**self.worker.common, **inputs})
            unit = yield from self.worker.unit(
                stage.name, "apply", inputs, functools.partial(self._make, step, candidate.model, folder)
            )
            if not folder.is_dir():  # dropped by a run with other wishes; the unit stays, the folder is made again
                self._make(step, candidate.model, folder, lambda *_: None)
            candidate.model = self.examiner.bench.load(folder)
            candidate.artifact, candidate.artifact_sha256 = folder, unit.value["sha256"]
            candidate.prefixes = (*candidate.prefixes, candidate.model)

    def _make(self, step: Step, model: Any, folder: Path, report: Report) -> Answer:
        if not folder.is_dir():
            state = folder.with_name(f"{folder.name}.state")

            def progress(message: str, fraction: float) -> None:
                report("apply", round(1000 * min(max(fraction, 0.0), 1.0)), 1000, "share")

            context = Context(
                output=folder,
                windows=self.examiner.texts.calib,
                seed=self.request.seed,
                work_dir=state,
                progress=progress,
            )
            self.examiner.bench.apply(step, model, context)
            shutil.rmtree(state, ignore_errors=True)
        return {"sha256": sha256_file(folder / MODEL_FILE), "bytes": folder_bytes(folder)}, {}

    def _judge(self, candidate: Candidate) -> Run:
        """Quality first, then cost; a recorded decision is taken as it is."""
        examiner, request, stage = self.examiner, self.request, candidate.name
        candidate.select = yield from examiner.read(candidate, "select", stage)
        assert self.original.select is not None
        evidence: Evidence = yield from examiner.evidence(
            candidate, candidate.select, self.original.select, "select", self.best, stage
        )
        candidate.evidence, candidate.loss = evidence, evidence.loss
        refused = judge_quality(
            evidence.loss,
            request.max_loss,
            strict_failures=evidence.guards.failed if request.strict else (),
            metric=evidence.metric,
        )
        candidate.speed = yield from examiner.speed(candidate, stage)
        gain: Ratio = yield from examiner.ratio(self.best, candidate, request.goal, stage, quads=3 if refused else 12)
        candidate.costs = (cost_ratio(request.goal, self.best.name, gain),)
        candidate.cost = gain.b
        candidate.speedup = compose(self.best.speedup, gain.interval.inverse())
        recorded = self._recorded(candidate.name)
        if recorded is not None:
            return recorded, gain
        if refused is not None:
            return refused, gain
        others = yield from self._other_costs(candidate, stage)
        return judge_cost(request.goal, gain, others), gain

    def _recorded(self, name: str) -> Judgement | None:
        replay = self.request.recipe.replay
        if replay is None:
            return None
        found = [decision for decision in replay.decisions if decision["stage"] == name]
        verdict: Verdict = "kept"
        if found and found[-1]["verdict"] != "kept":
            verdict = "dropped"
        return Judgement(verdict, "as recorded" if verdict == "kept" else f"as recorded: {found[-1]['reason']}")

    def _other_costs(self, candidate: Candidate, stage: str) -> Run:
        """The goals that were not asked for, coarsely, over the original; what cannot be measured is left out."""
        others: dict[str, float] = {}
        for goal in GOALS:
            if goal == self.request.goal or (goal != "memory" and not candidate.spec.causal):
                continue
            found: Ratio | None = yield from self.examiner.ratio(self.original, candidate, goal, stage, coarse=True)
            if found is not None:
                others[goal] = found.interval.mid
                candidate.costs = (*candidate.costs, cost_ratio(goal, "original", found))
                if goal == "memory" and candidate.speed is not None:
                    candidate.speed = dataclasses.replace(candidate.speed, peak_resident_bytes=int(found.b))
                if goal == "throughput" and candidate.speed is not None:
                    candidate.speed = dataclasses.replace(candidate.speed, throughput_tokens_per_second=1 / found.b)
        return others

    # ---- bookkeeping

    def _forget(self, candidate: Candidate) -> None:
        """A dropped artefact is not needed again, and disk is."""
        self.examiner.runners.drop(candidate)
        kept = {Path(model.path) for model in self.best.prefixes}
        if candidate.artifact is not None and candidate.artifact not in kept:
            shutil.rmtree(candidate.artifact, ignore_errors=True)

    def _row(self, index: int, candidate: Candidate, judgement: Judgement, gain: Ratio) -> LadderRow:
        replaced = self.best.name if judgement.verdict == "kept" and not self.best.is_original else None
        if replaced is not None and candidate.steps[: len(self.best.steps)] == self.best.steps:
            replaced = None
        return LadderRow(
            index=index,
            name=candidate.name,
            kind="stage",
            verdict=judgement.verdict,
            reason=judgement.reason,
            loss=candidate.loss,
            increment=candidate.evidence.increment if candidate.evidence else None,
            speedup=candidate.speedup if gain.steady or judgement.verdict == "kept" else None,
            gain=gain.interval.inverse() if gain.steady else None,
            weights_bytes=self.examiner.runners(candidate).weights_bytes,
            replaces=replaced,
            seconds=candidate.seconds,
        )

    def _not_run(self, index: int, stage: Stage, reason: str) -> StageJudged:
        row = LadderRow(index=index, name=stage.name, kind="stage", verdict="not run", reason=reason)
        self.receipts.append(self._receipt(row, None, stage, stage.steps[-1].resolved()))
        return self._judged(row)

    def _judged(self, row: LadderRow, *, resumed: bool = False) -> StageJudged:
        self.rows.append(row)
        return StageJudged(
            row=row,
            used_seconds=self.worker.used_seconds,
            time_budget_seconds=self.request.time_budget,
            best_speedup=self.best.speedup.mid,
            resumed=resumed,
        )

    def _receipt(
        self,
        row: LadderRow,
        candidate: Candidate | None,
        stage: Stage | None,
        options: dict[str, Any],
        margin: str = "",
        costs: tuple[CostRatio, ...] = (),
    ) -> StepReceipt:
        """The receipt of a row; receipts are written together, into the folder that is published."""
        evidence = candidate.evidence if candidate is not None else None
        if row.loss is not None and evidence is None:
            measure = self.examiner.ruler.name
            evidence = Evidence(cut="select", measure=measure, loss=row.loss, sources=(), guards=Guards())
        before = candidate.prefixes[-1 - len(stage.steps)] if candidate is not None and stage is not None else None
        return StepReceipt(
            index=row.index,
            step=row.name,
            stage=stage.name if stage else row.name,
            row=row,
            technique=stage.steps[-1].use if stage else None,
            options={key: value for key, value in options.items() if key != "use"},
            applied_to=candidate.applied_to if candidate is not None else None,
            spec_before=before.spec.digest if before is not None else None,
            spec_after=candidate.spec.digest if candidate is not None else None,
            model=facts(candidate, self.examiner.runners(candidate).weights_bytes) if candidate else None,
            artifact_sha256=candidate.artifact_sha256 if candidate is not None else None,
            seconds=row.seconds,
            evidence=evidence,
            speed=candidate.speed if candidate is not None else None,
            costs=costs or (candidate.costs if candidate is not None else ()),
            margin=margin,
            machine=str(self.examiner.machine),
            versions=self.versions,
            seed=self.request.seed,
            command=self.request.command,
        )


def compose(first: Interval, second: Interval) -> Interval:
    """The product of two independent speed-ups: half-widths add in squares on the logarithmic scale."""
    mid = first.mid * second.mid

    def side(high: bool) -> float:
        parts = [math.log((one.high if high else one.low) / one.mid) for one in (first, second)]
        return math.hypot(*parts)

    if not all(0 < value < math.inf for one in (first, second) for value in (one.low, one.high)):
        return Interval(0.0, mid, math.inf)
    return Interval(mid * math.exp(-side(False)), mid, mid * math.exp(side(True)))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
