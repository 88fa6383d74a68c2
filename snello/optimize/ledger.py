"""The ladder as it is written: rows for the reader, receipts for whoever checks, both in the order of judging."""

from __future__ import annotations

from typing import Any

from snello.measure.timing import Ratio
from snello.optimize.candidate import Candidate, facts
from snello.optimize.events import LadderRow, StageJudged
from snello.optimize.examine import Examiner
from snello.optimize.gate import Judgement
from snello.optimize.receipts import CostRatio, Evidence, Guards, StepReceipt
from snello.optimize.recipe import Stage


class Ledger:
    """Rows and receipts of one run."""

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.rows: list[LadderRow] = []
        self.receipts: list[StepReceipt] = []
        self.versions = examiner.bench.versions()

    @property
    def next_index(self) -> int:
        return len(self.receipts) + 1

    def judged(self, row: LadderRow, best: Candidate, *, resumed: bool = False) -> StageJudged:
        """Adds a row to the ladder and tells it."""
        self.rows.append(row)
        return StageJudged(
            row=row,
            used_seconds=self.examiner.worker.used_seconds,
            time_budget_seconds=self.examiner.request.time_budget,
            best_speedup=best.speedup.mid,
            resumed=resumed,
        )

    def stage_row(
        self, index: int, candidate: Candidate, best: Candidate, judgement: Judgement, gain: Ratio | None
    ) -> LadderRow:
        """The row of a stage that was made and measured; without a gain it was not timed beside the best."""
        told = gain is None or gain.steady or judgement.verdict == "kept"
        extends = candidate.steps[: len(best.steps)] == best.steps
        replaces = judgement.verdict == "kept" and not best.is_original and not extends
        return LadderRow(
            index=index,
            name=candidate.name,
            kind="stage",
            verdict=judgement.verdict,
            reason=judgement.reason,
            loss=candidate.loss,
            increment=candidate.evidence.increment if candidate.evidence else None,
            speedup=candidate.speedup if told else None,
            gain=gain.interval.inverse() if gain is not None and told else None,
            weights_bytes=self.examiner.runners.weights_bytes(candidate),
            replaces=best.name if replaces else None,
            seconds=candidate.seconds,
        )

    def receipt(
        self,
        row: LadderRow,
        candidate: Candidate | None,
        stage: Stage | None = None,
        margin: str = "",
        costs: tuple[CostRatio, ...] = (),
    ) -> StepReceipt:
        """The receipt of a row; receipts are written together, into the folder that is published."""
        evidence = candidate.evidence if candidate is not None else None
        if row.loss is not None and evidence is None:
            measure = self.examiner.ruler.name
            evidence = Evidence(cut="select", measure=measure, loss=row.loss, sources=(), guards=Guards())
        options: dict[str, Any] = stage.steps[-1].resolved() if stage is not None else {}
        before = candidate.prefixes[-1 - len(stage.steps)] if candidate is not None and stage is not None else None
        return StepReceipt(
            index=row.index,
            step=row.name,
            stage=stage.name if stage else row.name,
            row=row,
            technique=stage.steps[-1].use if stage else None,
            options={key: value for key, value in options.items() if key != "use"},
            applied_to=candidate.applied_to if candidate is not None else None,
            chain=tuple(step.resolved() for step in candidate.steps) if candidate is not None else (),
            spec_before=before.spec.digest if before is not None else None,
            spec_after=candidate.spec.digest if candidate is not None else None,
            model=facts(candidate, self.examiner.runners.weights_bytes(candidate)) if candidate else None,
            artifact_sha256=candidate.artifact_sha256 if candidate is not None else None,
            seconds=row.seconds,
            evidence=evidence,
            speed=candidate.speed if candidate is not None else None,
            sequences=candidate.sequences if candidate is not None else (),
            costs=costs or (candidate.costs if candidate is not None else ()),
            margin=margin,
            machine=str(self.examiner.machine),
            versions=self.versions,
            seed=self.examiner.request.seed,
            command=self.examiner.request.command,
        )
