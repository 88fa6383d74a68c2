"""Lossless: the lean model drafts, the original verifies, and the answers are the original's own.

Nothing is lost by construction, so no loss is measured: the gate is speed alone, of whole answers to real text, and
that the answers are in fact the same, greedy and drawn. Each draft is made from the original and tried beside it; the
best pair that pays is left, and it holds both models, which the sentence says. What a draft can lose is bounded by the
governor of the engine; a pair that is measurably slower at the goal that was not asked for is dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from snello.errors import SnelloError, Unsupported
from snello.measure.answers import SHORT, Answering, Sameness, prompts_of, sameness
from snello.measure.interval import Interval
from snello.measure.timing import MOST_QUADS, Ratio, ratio
from snello.models.pair import write_pair
from snello.optimize.candidate import Candidate
from snello.optimize.events import Event, LadderRow, StageStarted
from snello.optimize.examine import Examiner, cost_ratio
from snello.optimize.gate import Judgement, judge_cost
from snello.optimize.make import make
from snello.optimize.plain import revive
from snello.optimize.receipts import Evidence, Guards
from snello.optimize.recipe import Stage
from snello.optimize.work import Report

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.optimize.climb import Climb

Run: TypeAlias = Generator[Event, None, Any]
FLOOR = 0.97  # of the original's speed, at the goal that was not asked for
OTHER = {"latency": "throughput", "throughput": "latency"}
OTHER_QUADS = 3
DIFFER = "{} of {} answers differ from the original's: this is a defect of snello, please report it"


@dataclass(frozen=True)
class Timed:
    """Cost of the pair over the original alone, and whether both said the same."""

    ratio: Ratio
    same: Sameness


def check_lossless(model: Model) -> None:
    """Whether anything can draft for it.

    Raises:
        SnelloError: it writes no text, or is such a pair already.
    """
    if not model.spec.causal:
        raise SnelloError(
            f"{model.name} is an encoder: it writes nothing that could be drafted", "leave out --lossless"
        )
    if model.draft is not None:
        raise SnelloError(f"{model.name} has a draft already", f"give its original: {model.path}")


def climb_lossless(climb: Climb, stages: Sequence[Stage]) -> Run:
    """Every draft beside the original, each judged over the best so far."""
    for stage in stages:
        yield from _stage(climb, stage)


def _stage(climb: Climb, stage: Stage) -> Run:
    examiner, ledger, index = climb.examiner, climb.ledger, climb.ledger.next_index
    attempt = climb.attempt(stage)
    reason = climb.why_not(attempt)
    if not reason:
        yield StageStarted(index=index, stage=stage.name, predicted_seconds=attempt.seconds)
        before = climb.worker.finished_seconds
        try:
            pair = yield from _made(climb, stage)
        except Unsupported as error:
            reason = error.message
    if reason:
        row = LadderRow(index=index, name=stage.name, kind="stage", verdict="not run", reason=reason)
        ledger.receipts.append(ledger.receipt(row, None, stage))
        yield ledger.judged(row, climb.best)
        return
    judgement, gain = yield from _judge(climb, pair, stage.name)
    pair.seconds = climb.worker.finished_seconds - before
    climb.forecast.learn(stage, attempt.seconds, pair.seconds)
    row = ledger.stage_row(index, pair, climb.best, judgement, gain)
    ledger.receipts.append(ledger.receipt(row, pair, stage, judgement.margin))
    climb.judged.append(pair)
    assert pair.draft is not None
    examiner.runners.drop(pair.draft)
    if judgement.verdict == "kept":
        climb.best = pair
    yield ledger.judged(row, climb.best)


def _made(climb: Climb, stage: Stage) -> Run:
    """The draft, and the folder of both."""
    from snello.engine.draft_model import check_draft

    examiner, original = climb.examiner, climb.original
    draft = Candidate(name=stage.name, model=original.model, steps=stage.steps, prefixes=original.prefixes)
    yield from make(examiner, stage, draft)
    check_draft(original.model, draft.model)
    assert draft.artifact is not None
    folder = draft.artifact.with_name(f"{draft.artifact.name}.pair")
    if not folder.is_dir():
        write_pair(folder, original.model, draft.artifact)
    return Candidate(
        name=stage.name,
        model=examiner.bench.load(folder),
        steps=stage.steps,
        artifact=folder,
        artifact_sha256=draft.artifact_sha256,
        applied_to="original",
        select=original.select,
        prefixes=draft.prefixes,
        evidence=evidence(examiner, "select"),
        draft=draft,
    )


def evidence(examiner: Examiner, cut: Any) -> Evidence:
    """No loss by construction: the original says every word."""
    nothing, guards = Interval.exact(0.0), Guards(top1_agreement=1.0)
    return Evidence(cut=cut, measure=examiner.ruler.name, loss=nothing, sources=(), guards=guards)


# ---- the gate ----


def _judge(climb: Climb, pair: Candidate, stage: str) -> Run:
    """The judgement, and the gain over the original."""
    examiner, goal = climb.examiner, climb.request.goal
    pair.speed = yield from examiner.speed(pair, stage)  # of the original in it, which does not change
    timed: Timed = yield from answers_ratio(examiner, pair, goal, "select", stage)
    found = timed.ratio
    pair.costs = (cost_ratio(goal, "original", found),)
    pair.cost, pair.speedup = found.b, found.interval.inverse()
    if timed.same.different:
        return Judgement("dropped", DIFFER.format(timed.same.different, timed.same.answers)), found
    other: Timed = yield from answers_ratio(examiner, pair, OTHER[goal], "select", stage, quads=OTHER_QUADS)
    pair.costs = (*pair.costs, cost_ratio(OTHER[goal], "original", other.ratio))
    return judge_pair(goal, found, other.ratio, climb.best), found


def judge_pair(goal: str, found: Ratio, other: Ratio, best: Candidate) -> Judgement:
    """Both are costs over the original's. A pair takes another's place where it is faster."""
    judgement = judge_cost(goal, found, {})
    if judgement.verdict != "kept":
        return judgement
    if other.interval.low > 1 / FLOOR:
        return Judgement("dropped", f"{OTHER[goal]} is {other.interval.mid - 1:.0%} worse", judgement.margin)
    if not best.is_original and found.interval.inverse().mid <= best.speedup.mid:
        return Judgement("dropped", f"{best.name} is faster", judgement.margin)
    return judgement


def answers_ratio(
    examiner: Examiner, pair: Candidate, goal: str, cut: str, stage: str, *, quads: int = MOST_QUADS
) -> Run:
    """Whole answers of the pair beside those of the original alone, in turn."""
    assert pair.draft is not None
    inputs = {
        "models": [examiner.original.digest, pair.draft.digest],
        "answers": [goal, cut, quads, str(examiner.workload)],
        "text": examiner.texts.sha256,
        "machine": str(examiner.machine.cpu),
    }

    def work(report: Report) -> Any:
        def step(done: int, total: int) -> None:
            report(f"answer beside {examiner.original.name}", done, total, "pair")

        alone, with_draft = _sides(examiner, pair, goal, cut, quads)
        try:
            found = ratio(alone.seconds, with_draft.seconds, most_quads=quads, step=step)
            return Timed(found, sameness(alone, with_draft)), {}
        finally:
            assert with_draft.drafter is not None
            with_draft.drafter.close()

    unit = yield from examiner.worker.unit(stage, "answers", inputs, work)
    return revive(Timed, unit.value)


def _sides(examiner: Examiner, pair: Candidate, goal: str, cut: str, quads: int) -> tuple[Answering, Answering]:
    from snello.engine.draft_model import DraftModel

    executor: Any = examiner.runners(examiner.original)
    assert pair.draft is not None
    work, tokenizer = examiner.workload, examiner.original.model.tokenizer
    streams, length = (work.streams, min(SHORT, work.prompt)) if goal == "throughput" else (1, work.prompt)
    calls = 2 * quads + 1
    prompts = prompts_of(examiner.texts.blocks(cut), length, calls * streams)
    groups = [prompts[number * streams : (number + 1) * streams] for number in range(calls)]
    drafter = DraftModel(pair.draft.model, executor, max_num_seqs=streams)
    alone = Answering(executor, tokenizer, groups, work.generate)
    return alone, Answering(executor, tokenizer, groups, work.generate, drafter)
