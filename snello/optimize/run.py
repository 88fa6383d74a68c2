"""The life of a model: from what was asked to a folder with a proof, told as a stream of events.

    load -> machine -> text -> what it can prove -> plan -> stages, each judged -> proof, read once -> folder

Every unit of work is journaled in `<output>.work/`: a run that is killed at any moment goes on after the last finished
unit, and the output folder is the old one or the new one, never half of it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import snello
from snello.errors import SnelloError
from snello.measure import quality, self_written
from snello.measure.documents import Document
from snello.measure.rulers import Reading
from snello.measure.speed import Workload
from snello.measure.text import WINDOW, Limits, Texts
from snello.optimize import publish, texts
from snello.optimize.candidate import Candidate, Runners
from snello.optimize.climb import Climb
from snello.optimize.events import (
    Event,
    Finished,
    MachineProbed,
    ModelLoaded,
    Planned,
    Result,
    StageStarted,
    TextRead,
    TextSource,
    Warned,
)
from snello.optimize.examine import Examiner, model_prompts
from snello.optimize.files import recover_folder
from snello.optimize.journal import Journal
from snello.optimize.planner import Goals, forecast_for
from snello.optimize.receipts import revive
from snello.optimize.recipe import Recipe
from snello.optimize.request import Request, check_output, resolve
from snello.optimize.work import Interrupts, Report, RunStopped, Worker
from snello.optimize.workbench import NativeWorkbench, Workbench

Run: TypeAlias = Generator[Event, None, Any]
PILOT_TOKENS = 2_048
SELECT_SHARE, PROOF_SHARE = 0.03, 0.06  # of the time budget, that reading a cut once may take
LEAST_TOKENS = 8_192


def optimize(
    model: str | Path | None = None,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    max_loss: float | str | None = None,
    goal: str | None = None,
    output: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    time_budget: float | None = None,
    strict: bool | None = None,
    metric: str | None = None,
    target: float | str | None = None,
    dry_run: bool = False,
    seed: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    command: Sequence[str] = (),
    finish: Callable[[Path], None] | None = None,
    workbench: Workbench | None = None,
) -> Iterator[Event]:
    """Makes a model lean and proves it, as a stream of events whose last is `Finished`.

    Args:
        text: files or folders; the worst counts. Without any, the original writes its own.
        max_loss: 0.01 or "1%"; default 1%.
        goal: "latency" (default), "throughput" or "memory".
        time_budget: seconds for everything; default 30 minutes.
        target: the least speed-up by the goal that counts as success, 2 or "2x".
        command: what to record as the command that was run.
        finish: called with the complete folder before it is put in place; writes the report.

    Raises:
        SnelloError: something that the user can mend.
    """
    request = resolve(
        model,
        text=text,
        max_loss=max_loss,
        goal=goal,
        output=output,
        recipe=recipe,
        time_budget=time_budget,
        strict=strict,
        metric=metric,
        target=target,
        seed=seed,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        command=command,
    )
    with Interrupts() as interrupts:
        run = _Optimizer(request, workbench or NativeWorkbench(), interrupts, finish)
        try:
            yield from run.events()
        except RunStopped:
            yield Finished(result=run.stopped())
        finally:
            run.close()


class _Optimizer:
    """One run. `events` tells it from beginning to end."""

    def __init__(
        self,
        request: Request,
        workbench: Workbench,
        interrupts: Interrupts,
        finish: Callable[[Path], None] | None,
    ) -> None:
        self.request = request
        self.bench = workbench
        self.finish = finish
        recover_folder(request.output)
        if not request.dry_run:
            check_output(request)
        if not request.resume:
            shutil.rmtree(request.work, ignore_errors=True)
        self.journal = Journal(request.work)
        self.resumed = not self.journal.is_new
        common = {"seed": request.seed, "version": snello.__version__}
        self.worker = Worker(self.journal, interrupts, request.time_budget, common)
        self.runners = Runners(self._open)

    def _open(self, model: Any) -> Any:
        workload = Workload.fitting(model.spec)
        return self.bench.open(model, context=max(WINDOW, workload.prompt + workload.generate))

    def events(self) -> Iterator[Event]:
        request = self.request
        model = self.bench.load(request.model)
        original = Candidate(name="original", model=model, prefixes=(model,))
        yield from self._introduce(original)
        examiner = yield from self._examiner(original)
        if request.dry_run:
            yield from self._dry_run(examiner)
            return
        yield StageStarted(index=1, stage="original", predicted_seconds=0.0)
        original.select = yield from examiner.read(original, "select", "original")
        power, fault = self._power(examiner, original.select)
        sources = self._sources(examiner.texts, power)
        yield TextRead(
            sources=sources,
            self_written=examiner.texts.self_written,
            smallest_provable=power.worst,
            max_loss=request.max_loss,
            measure=examiner.ruler.name,
        )
        if not power.enough:
            shutil.rmtree(request.work, ignore_errors=True)
            sentence = power.sentence
            yield Finished(result=Result(exit_code=4, sentence=sentence, reason=sentence, seconds=self._seconds))
            return
        climb = Climb(examiner, self.journal, power=power, fault=fault, sources=sources)
        yield from climb.events()
        result = yield from publish.conclude(climb, self.finish)
        yield Finished(result=result)

    @property
    def _seconds(self) -> float:
        return self.worker.used_seconds

    # ---- before work

    def _introduce(self, original: Candidate) -> Iterator[Event]:
        model = original.model
        runner = self.runners(original)
        yield ModelLoaded(
            model=str(model.name),
            path=Path(model.path),
            num_parameters=model.num_parameters,
            weights=model.spec.default_format.weights,
            weights_bytes=runner.weights_bytes,
            digest=original.digest,
            resumed=self.resumed,
        )
        found = self.machine = self.bench.machine()
        limit = Goals("latency", found, Workload.fitting(model.spec)).ceiling(model.spec)
        yield MachineProbed(
            cpu=found.cpu,
            cores=found.cores,
            threads=found.threads,
            isa=found.isa,
            memory_bytes=found.memory_bytes,
            bandwidth_gigabytes=found.bandwidth[-1][1] / 1e9,
            possible_decode_tokens_per_second=limit.decode_tokens_per_second,
            possible_prefill_tokens_per_second=limit.prefill_tokens_per_second,
        )

    def _examiner(self, original: Candidate) -> Run:
        request, model = self.request, original.model
        self_wrote = not request.text
        if self_wrote and not model.spec.causal:
            raise SnelloError("an encoder cannot write its own text", "give one: --text yours.txt")
        if self_wrote:
            yield Warned(
                message="no text was given: the model writes its own, which says nothing about your work",
                hint="--text yours.txt",
            )
            sources = [(yield from self._write_text(original))]
        else:
            sources = texts.read_documents(request.text, model)
        ruler = texts.ruler_of(model, sources)
        limits = request.limits or (yield from self._limits(original))
        found = texts.cut(sources, model, seed=request.seed, limits=limits, self_written=self_wrote)
        dropped = sum(source.dropped_blocks for source in found.sources)
        if dropped:
            yield Warned(message=f"{dropped} blocks share 13 tokens in a row with the calibration text: left out")
        self._check_replay(original, found)
        return Examiner(
            request=dataclasses.replace(request, limits=limits),
            bench=self.bench,
            worker=self.worker,
            runners=self.runners,
            ruler=ruler,
            texts=found,
            workload=Workload.fitting(model.spec),
            machine=self.machine,
            original=original,
        )

    def _write_text(self, original: Candidate) -> Run:
        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report("write", done, total, "answer")

            longest = min(1_024, original.spec.max_positions)
            runner = self.bench.open(original.model, context=longest, streams=16)
            try:
                prompts = [prompt[: longest // 2] for prompt in model_prompts(original.model)]
                return self_written.write(runner, prompts, seed=self.request.seed, step=step), {}
            finally:
                runner.close()

        unit = yield from self.worker.unit("text", "write", {"model": original.digest}, work)
        return revive(list[Document], unit.value)

    def _limits(self, original: Candidate) -> Run:
        """How much text the time budget allows to read, from the speed of a first window."""
        seed = self.request.seed

        def work(report: Report) -> Any:
            report("measure", 0, 1, "window")
            runner = self.runners(original)
            length = min(WINDOW, runner.context, PILOT_TOKENS)
            speed = texts.reading_speed(runner, length, seed)
            cuts = {"select": SELECT_SHARE, "proof": PROOF_SHARE}
            most = {name: int(speed * share * self.request.time_budget) for name, share in cuts.items()}
            default = Limits()
            return {
                "calib": default.calib,
                "select": min(default.select, max(LEAST_TOKENS, most["select"])),
                "proof": min(default.proof, max(LEAST_TOKENS, most["proof"])),
            }, {}

        inputs = {"model": original.digest, "budget": self.request.time_budget}
        unit = yield from self.worker.unit("text", "limits", inputs, work)
        return Limits(**unit.value)

    def _check_replay(self, original: Candidate, found: Texts) -> None:
        replay = self.request.recipe.replay
        if replay is None:
            return
        if replay.model_digest != original.digest:
            raise SnelloError("the recipe was recorded on another model", "remove [replay] to decide afresh")
        if replay.text_sha256 != found.sha256:
            raise SnelloError("the recipe was recorded on another text", "remove [replay] to decide afresh")

    def _power(self, examiner: Examiner, original: Reading) -> tuple[quality.Power, Reading]:
        """What the text can prove: the smaller of select, as measured, and proof, by its number of tokens."""
        request, blocks = self.request, examiner.texts.blocks("select")
        fault = quality.plant(examiner.ruler, original, blocks, max_loss=request.max_loss, seed=request.seed)
        power = quality.power(
            examiner.ruler,
            original,
            fault,
            blocks,
            max_loss=request.max_loss,
            total_tokens=sum(s.tokens("select") + s.tokens("proof") for s in examiner.texts.sources),
            seed=request.seed,
        )
        smallest = {}
        for source in examiner.texts.sources:
            scale = source.tokens("select") / max(1, source.tokens("proof"))
            smallest[source.name] = power.smallest[source.name] * max(1.0, scale)
        return dataclasses.replace(power, smallest=smallest), fault

    def _sources(self, found: Texts, power: quality.Power | None) -> tuple[TextSource, ...]:
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

    # ---- ends

    def _dry_run(self, examiner: Examiner) -> Iterator[Event]:
        yield TextRead(
            sources=self._sources(examiner.texts, None),
            self_written=examiner.texts.self_written,
            smallest_provable=math.nan,
            max_loss=self.request.max_loss,
            measure=examiner.ruler.name,
        )
        goals = Goals(self.request.goal, self.machine, examiner.workload)
        tokens = sum(source.tokens("select") for source in examiner.texts.sources)
        forecast = forecast_for(examiner.original.spec, goals, tokens, None, None)
        climb = Climb(examiner, self.journal, power=None, fault=None, sources=())
        plan: Planned = climb.plan(goals, forecast)
        yield plan
        if not self.resumed:
            shutil.rmtree(self.request.work, ignore_errors=True)
        running = sum(stage.runs for stage in plan.stages)
        sentence = f"would try {running} stages in about {plan.predicted_seconds / 60:.0f} min; nothing was changed"
        yield Finished(result=Result(exit_code=0, sentence=sentence, reason="dry run", seconds=self._seconds))

    def stopped(self) -> Result:
        sentence = "interrupted: everything finished is kept; the same command goes on from here"
        return Result(exit_code=130, sentence=sentence, reason="interrupted", seconds=self._seconds)

    def close(self) -> None:
        self.runners.close()


def run(model: str | Path | None = None, **options: Any) -> Result:
    """`optimize` to its end; the stream's last event as a `Result`."""
    last: Event | None = None
    on_event = options.pop("on_event", None)
    for last in optimize(model, **options):
        if on_event is not None:
            on_event(last)
    assert isinstance(last, Finished)
    return last.result
