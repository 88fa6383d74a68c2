"""The ladder: baseline, the instrument's own checks, then stage after stage, each judged against the best so far.

A recipe's stages come one after the other, each applied to the best so far (or in place of the end of its chain where
it uses the same technique again); without a recipe `search` proposes them. A stage is measured, and kept or dropped:
only a candidate that pays over the best, or loses less at the same cost, takes its place. A target ends the ladder as
soon as it is reached.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from snello.errors import Unsupported
from snello.measure.interval import Interval
from snello.measure.quality import Power
from snello.measure.rulers import Reading
from snello.native.core import NotFinite
from snello.optimize.baseline import first_rows
from snello.optimize.candidate import Candidate
from snello.optimize.events import (
    Event,
    LadderRow,
    Planned,
    StageJudged,
    StageStarted,
    TextSource,
)
from snello.optimize.examine import Examiner
from snello.optimize.journal import Journal, Unit, unit_key
from snello.optimize.ledger import Ledger
from snello.optimize.lossless import climb_lossless
from snello.optimize.make import make
from snello.optimize.plain import revive
from snello.optimize.plan import plan, preflight
from snello.optimize.planner import Forecast, Goals, Overhead, Prospect, forecast_for, prospect, why_not_run
from snello.optimize.proposals import Subject, cache_stage, drafts
from snello.optimize.receipts import StepReceipt
from snello.optimize.recipe import Stage, Step
from snello.optimize.search import search
from snello.optimize.trial import costs_the_same, judge

Run: TypeAlias = Generator[Event, None, Any]
TOO_LONG = "needs about"


@dataclass(frozen=True)
class Attempt:
    """A stage that is about to be tried: what it would be, what it should take, what the journal knows of it."""

    candidate: Candidate
    found: Prospect
    equal: bool  # in cost to the best so far
    seconds: float
    inputs: dict[str, Any]
    known: Unit | None


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
        self.reserved_seconds = 0.0  # that later phases get before the stage at hand
        self.chain_seconds = 0.0  # that a chain which may pay gets before a stage that cannot
        self.goals = Goals(self.request.goal, examiner.machine, examiner.workload)
        self.overhead = Overhead(self.goals)
        self.forecast = self._forecast(None, None)

    @property
    def worker(self) -> Any:
        return self.examiner.worker

    @property
    def subject(self) -> Subject:
        return Subject(self.original.spec, self.request.goal, self.original.model.grid)

    @property
    def searches(self) -> bool:
        """Without a recipe the stages are proposed by what was measured."""
        request = self.request
        return not request.recipe.stages and request.recipe.replay is None and not request.lossless

    @property
    def stages(self) -> Sequence[Stage]:
        """The recipe's; without any, what is usual for a draft. Not for a search, which proposes its own."""
        if self.request.recipe.stages or not self.request.lossless:
            return self.request.recipe.stages
        return drafts(self.subject)

    @property
    def reached(self) -> bool:
        """Whether the target is met on the selection text; by the original only where it is a size."""
        target = self.request.target
        if target is None or (target.unit == "x" and self.best.is_original):
            return False
        return target.reached(self.best.speedup, self.best.peak)

    # ---- from the bottom

    def events(self) -> Iterator[Event]:
        assert self.fault is not None
        first = yield from first_rows(self.examiner, self.ledger, self.fault)
        original = self.original
        speed = original.speed.prefill_tokens_per_second.mid if original.speed else self._reading_speed()
        self.forecast = self._forecast(speed, original.cost if self.request.goal == "latency" else None)
        assert original.cost is not None
        self.overhead.learn(original.spec, original.cost)
        self.planned = plan(self)
        yield self.planned
        yield from preflight(self.planned)
        for row in first:
            yield self.ledger.judged(row, self.best)
        if self.searches:
            yield from search(self)
            return
        if self.request.lossless:
            yield from climb_lossless(self, self.stages)
            return
        for stage in self.stages:
            yield from self.stage(stage)

    def _reading_speed(self) -> float | None:
        """Tokens a second at which the original read the text of the search: an encoder has no other speed."""
        seconds = self.examiner.seconds_to_read(self.original, "select")
        tokens = sum(source.tokens("select") for source in self.examiner.texts.sources)
        return tokens / seconds if seconds else None

    def _forecast(self, speed: float | None, run_seconds: float | None) -> Forecast:
        """From what was measured of the original, else from its ceilings."""
        sources = self.examiner.texts.sources
        tokens = sum(source.tokens("select") for source in sources)
        forecast = forecast_for(self.original.spec, self.goals, tokens, speed, run_seconds)
        self.proof_seconds = forecast.proof(sum(source.tokens("proof") for source in sources))
        return forecast

    # ---- one stage

    def stage(self, stage: Stage, *, alone: bool = False, made: int = 0, refused: str = "") -> Run:
        """Tries a stage on the best so far (`alone`: on the original); the candidate, or None where it was not run.

        Args:
            made: so many of its first steps are done.
            refused: why it is not worth trying; a stage that the journal knows is taken from there all the same.
        """
        attempt = self._attempt(stage, self.original if alone else self.best, made)
        index, candidate, known = self.ledger.next_index, attempt.candidate, attempt.known
        reason = self._why_not(attempt, refused)
        if not reason and known is None:
            yield StageStarted(index=index, stage=stage.name, predicted_seconds=attempt.seconds)
            try:
                known = yield from self._run_stage(stage, candidate, index, attempt.inputs)
            except (Unsupported, NotFinite) as error:
                reason = error.message
        if known is None or reason:
            yield self._not_run(index, stage, reason)
            return None
        self.forecast.learn(stage, attempt.seconds, known.seconds, made=made)
        yield self._take(candidate, known, resumed=candidate.select is None)
        assert attempt.found.spec is not None and candidate.cost is not None
        self.overhead.learn(attempt.found.spec, candidate.cost)
        return candidate

    def attempt(self, stage: Stage) -> Attempt:
        """The stage on the original."""
        return self._attempt(stage, self.original, 0)

    def why_not(self, attempt: Attempt) -> str:
        """Why it is not run; empty where it is."""
        return self._why_not(attempt, "")

    def _attempt(self, stage: Stage, base: Candidate, made: int) -> Attempt:
        model, kept, prefixes = base.base_for(stage.steps)
        candidate = Candidate(name=stage.name, model=model, steps=(*kept, *stage.steps), prefixes=prefixes)
        candidate.applied_to = self.best.name if kept else "original"
        found = prospect(stage, model.spec, self.original.spec, self.goals, self.examiner.bench.plan)
        equal = found.spec is not None and costs_the_same(found.spec, self.best)
        seconds = self.forecast.stage(stage, found.speedup, timed=not equal, made=made)
        inputs = self._stage_inputs(stage, candidate.steps)
        return Attempt(candidate, found, equal, seconds, inputs, self.worker.known("stage", inputs))

    def _stage_inputs(self, stage: Stage, steps: Sequence[Step]) -> dict[str, Any]:
        """Everything that a stage's verdict depends on."""
        request, examiner = self.request, self.examiner
        wishes = (request.max_loss, request.goal, request.strict, request.metric)
        recorded = request.recipe.replay.decisions if request.recipe.replay is not None else None
        return {
            "stage": stage.name,
            "steps": [step.resolved() for step in steps],
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
            "peak": candidate.peak,
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
        candidate.cost, candidate.peak = known.value["cost"], known.value["peak"]
        candidate.seconds = known.seconds
        candidate.evidence, candidate.speed, candidate.costs = receipt.evidence, receipt.speed, receipt.costs
        candidate.sequences, candidate.artifact_sha256 = receipt.sequences, receipt.artifact_sha256
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

    def _why_not(self, attempt: Attempt, refused: str) -> str:
        replayed = self.request.recipe.replay is not None
        if self.reached and not replayed:
            return f"the target of {self.request.target} is reached"
        if attempt.known is not None:
            return ""
        if attempt.equal and same_steps(attempt.candidate.steps, self.best.steps):
            return f"same as {self.best.name}"
        if refused or replayed:
            return refused or attempt.found.reason
        reason = "" if attempt.equal else self.why_not_pay(attempt.found)
        return reason or self._why_no_time(attempt)

    def _why_no_time(self, attempt: Attempt) -> str:
        """What may still pay gets its time first: later phases, and chains and the INT8 cache before an equal cost."""
        equal = self._reserve(attempt.candidate.steps) + self.chain_seconds if attempt.equal else 0.0
        left = self.worker.left_seconds - self.proof_seconds - (equal or self.reserved_seconds)
        if attempt.seconds <= left:
            return ""
        return f"{TOO_LONG} {in_words(attempt.seconds)}, {in_words(max(0.0, left))} left"

    def why_not_pay(self, found: Prospect) -> str:
        return why_not_run(found, self.best.spec, self.best.name, self.best.cost, self.goals, self.overhead)

    def _reserve(self, steps: Sequence[Step]) -> float:
        """Seconds for the INT8 cache on top of these steps, which may still pay where an equal cost cannot."""
        extra = cache_stage(self.original.spec, steps) if self.searches else None
        return 0.0 if extra is None else self.seconds_if_it_may_pay(extra)

    def seconds_if_it_may_pay(self, stage: Stage) -> float:
        """What a stage on the original would take; 0 where it would not be run."""
        original = self.original.spec
        found = prospect(stage, original, original, self.goals, self.examiner.bench.plan)
        return 0.0 if self.why_not_pay(found) else self.forecast.stage(stage, found.speedup)

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


def in_words(seconds: float) -> str:
    """ "80 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
