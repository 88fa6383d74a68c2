"""Before work: the text is read or written, cut, and asked what it can prove at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from typing import Any, TypeAlias

from snello.errors import SnelloError
from snello.measure import quality, self_written
from snello.measure.documents import Document
from snello.measure.machine import Machine
from snello.measure.rulers import Reading
from snello.measure.speed import Workload
from snello.measure.text import WINDOW, Limits, Texts
from snello.optimize import texts
from snello.optimize.candidate import Candidate, Runners
from snello.optimize.events import Event, TextSource, Warned
from snello.optimize.examine import Examiner, model_prompts
from snello.optimize.gate import judge_quality
from snello.optimize.plain import revive
from snello.optimize.request import Request
from snello.optimize.work import Report, Worker
from snello.optimize.workbench import Workbench
from snello.techniques.base import wanted_tokens

Run: TypeAlias = Generator[Event, None, Any]
PILOT_TOKENS = 2_048
SELECT_SHARE, PROOF_SHARE = 0.03, 0.06  # of the time budget, that reading a cut once may take
LEAST_TOKENS = 8_192
BLIND = "this text proves nothing: a planted fault goes unseen on it, for example where all labels are the same"


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a run works with, whatever the model."""

    bench: Workbench
    worker: Worker
    runners: Runners
    machine: Machine


def prepare(request: Request, tools: Tools, original: Candidate, documents: list[list[Document]]) -> Run:
    """The text, cut, and everything that measuring on it needs: an `Examiner`. `documents`: of each `--text`."""
    bench, worker, runners = tools.bench, tools.worker, tools.runners
    model = original.model
    self_wrote = not request.text
    if self_wrote and not model.spec.causal:
        raise SnelloError("an encoder cannot write its own text", "give one: --text yours.txt")
    if self_wrote:
        yield Warned(
            message="no text was given: the model writes its own, which says nothing about your work",
            hint="--text yours.txt",
        )
        answers = self_written.answers_per_prompt(model.num_parameters)
        documents = [(yield from _write_text(request, bench, worker, original, 0, answers))]
    ruler = texts.ruler_of(model, documents)
    limits = request.limits or (yield from _limits(request, worker, runners, original))
    examiner = Examiner(
        request=dataclasses.replace(request, limits=limits),
        bench=bench,
        worker=worker,
        runners=runners,
        ruler=ruler,
        texts=texts.cut(documents, model, seed=request.seed, limits=limits, self_written=self_wrote),
        workload=Workload.fitting(model.spec),
        machine=tools.machine,
        original=original,
    )
    if self_wrote and not request.lossless:
        examiner = yield from _enough(examiner, documents[0])
    dropped = sum(source.dropped_blocks for source in examiner.texts.sources)
    if dropped:
        yield Warned(message=f"{dropped} blocks share 13 tokens in a row with the calibration text: left out")
    _check_replay(request, original, examiner.texts)
    return examiner


def _enough(examiner: Examiner, written: list[Document]) -> Run:
    """The same with more text where what the model wrote cannot prove the loss that was asked. No clock has a say, so a
    replay reads the same text.
    """
    request, original = examiner.request, examiner.original
    model = original.model
    power, _ = power_of(examiner, (yield from examiner.read(original, "select", "text")), timed=False)
    begun = self_written.answers_per_prompt(model.num_parameters)
    answers = self_written.answers_wanted(model.num_parameters, power.worst / request.max_loss)
    if answers == begun:
        return examiner
    assert request.limits is not None
    more = yield from _write_text(request, examiner.bench, examiner.worker, original, begun, answers)
    documents = [[*written, *more]]
    found = texts.cut(documents, model, seed=request.seed, limits=request.limits, self_written=True)
    return dataclasses.replace(examiner, texts=found)


def _write_text(
    request: Request, bench: Workbench, worker: Worker, original: Candidate, begun: int, answers: int
) -> Run:
    def work(report: Report) -> Any:
        def step(done: int, total: int) -> None:
            report("write", done, total, "answer")

        longest = min(1_024, original.spec.max_positions)
        runner = bench.open(original.model, context=longest, streams=16)
        try:
            prompts = [prompt[: longest // 2] for prompt in model_prompts(original.model)]
            said = self_written.write(runner, prompts, answers=answers, begun=begun, seed=request.seed, step=step)
            return said, {}
        finally:
            runner.close()

    unit = yield from worker.unit("text", "write", {"model": original.digest, "answers": [begun, answers]}, work)
    return revive(list[Document], unit.value)


def _limits(request: Request, worker: Worker, runners: Runners, original: Candidate) -> Run:
    """How much text the time budget allows to read, from the speed of a first window."""
    seed = request.seed
    steps = [step for stage in request.recipe.stages for step in stage.steps]
    wanted = max((wanted_tokens(step.technique) for step in steps), default=0)

    def work(report: Report) -> Any:
        report("measure", 0, 1, "window")
        runner = runners(original)
        length = min(WINDOW, runner.context, PILOT_TOKENS)
        speed = texts.reading_speed(runner, length, seed)
        cuts = {"select": SELECT_SHARE, "proof": PROOF_SHARE}
        most = {name: int(speed * share * request.time_budget) for name, share in cuts.items()}
        default = Limits()
        return {
            "calib": max(default.calib, wanted),
            "select": min(default.select, max(LEAST_TOKENS, most["select"])),
            "proof": min(default.proof, max(LEAST_TOKENS, most["proof"])),
        }, {}

    inputs = {"model": original.digest, "budget": request.time_budget, "training": wanted}
    unit = yield from worker.unit("text", "limits", inputs, work)
    return Limits(**unit.value)


def _check_replay(request: Request, original: Candidate, found: Texts) -> None:
    replay = request.recipe.replay
    if replay is None:
        return
    if replay.model_digest != original.digest:
        raise SnelloError("the recipe was recorded on another model", "remove [replay] to decide afresh")
    if replay.text_sha256 != found.sha256:
        raise SnelloError("the recipe was recorded on another text", "remove [replay] to decide afresh")


def power_of(examiner: Examiner, original: Reading, *, timed: bool) -> tuple[quality.Power, Reading]:
    """What the text can prove: the smaller of select, as measured, and proof, by its number of tokens.

    `timed`: the limits of what is read came from the time budget.
    """
    request, blocks = examiner.request, examiner.texts.blocks("select")
    fault = quality.plant(examiner.ruler, original, blocks, max_loss=request.max_loss, seed=request.seed)
    power = quality.power(
        examiner.ruler,
        original,
        fault,
        blocks,
        max_loss=request.max_loss,
        total_tokens=sum(source.num_tokens for source in examiner.texts.sources),
        seed=request.seed,
    )
    smallest = {}
    for source in examiner.texts.sources:
        scale = source.tokens("select") / max(1, source.tokens("proof"))
        smallest[source.name] = power.smallest[source.name] * max(1.0, scale)
    worst = max(examiner.texts.sources, key=lambda source: smallest[source.name])
    known = math.isfinite(smallest[worst.name]) and power.worst > 0
    needed = math.ceil(power.tokens_needed * smallest[worst.name] / power.worst) if known else 0
    reading = _reading(examiner, smallest[worst.name] / request.max_loss, timed) if known and worst.cut_short else ""
    return dataclasses.replace(power, smallest=smallest, tokens_needed=needed, reading=reading), fault


def _reading(examiner: Examiner, factor: float, timed: bool) -> str:
    """What lets `factor` times as much be read."""
    limits, usual = examiner.request.limits, Limits()
    assert limits is not None
    if timed and (limits.select < usual.select or limits.proof < usual.proof):
        return "a longer --time-budget"
    select, proof = (quality.round_up(math.ceil(factor * most)) for most in (limits.select, limits.proof))
    return f"a recipe with [data] select_tokens = {select}, proof_tokens = {proof}"


def catches(examiner: Examiner, original: Reading, fault: Reading) -> bool:
    """Whether the judge that the stages will meet refuses the planted fault on every source."""
    blocks = examiner.texts.blocks("select")
    found = quality.compare(examiner.ruler, original, fault, blocks, seed=examiner.seed)
    return all(judge_quality(one.loss, examiner.request.max_loss) is not None for one in found.sources)


def sources_of(found: Texts, power: quality.Power | None) -> tuple[TextSource, ...]:
    return tuple(
        TextSource(
            name=source.name,
            documents=source.documents,
            calib_tokens=sum(map(len, source.calib)),
            select_tokens=source.tokens("select"),
            proof_tokens=source.tokens("proof"),
            dropped_blocks=source.dropped_blocks,
            smallest_provable=None if power is None else power.smallest[source.name],
        )
        for source in found.sources
    )
