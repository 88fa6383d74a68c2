"""The life of a model: from what was asked to a folder with a proof, told as a stream of events.

    load -> machine -> text -> what it can prove -> plan -> stages, each judged -> proof, read once -> folder

Every unit of work is journaled in `<output>.work/`: a run that is killed at any moment goes on after the last finished
unit, and the output folder is the old one or the new one, never half of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import snello
from snello.errors import SnelloError, storage_error
from snello.measure.speed import Workload
from snello.measure.text import WINDOW
from snello.optimize import publish, texts
from snello.optimize.candidate import Candidate, Runners
from snello.optimize.climb import Climb, in_words
from snello.optimize.events import (
    Event,
    Finished,
    MachineProbed,
    ModelLoaded,
    Result,
    StageStarted,
    TextRead,
    Warned,
)
from snello.optimize.examine import Examiner
from snello.optimize.files import recover_folder
from snello.optimize.journal import Journal
from snello.optimize.lossless import check_lossless
from snello.optimize.plan import plan
from snello.optimize.planner import Goals
from snello.optimize.prepare import BLIND, Tools, catches, power_of, prepare, sources_of
from snello.optimize.recipe import Recipe
from snello.optimize.request import Request, check_output, check_place, resolve
from snello.optimize.target import Target
from snello.optimize.work import Interrupts, RunStopped, Worker
from snello.optimize.workbench import NativeWorkbench, Workbench

Run: TypeAlias = Generator[Event, None, Any]


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
    lossless: bool | None = None,
    target: Target | float | str | None = None,
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
        lossless: the lean model drafts for the original, whose answers stay as they are; the gate is speed alone.
        time_budget: seconds for everything; default 30 minutes.
        target: the least that counts as success, and enough: a speed-up by the goal, 2 or "2x", or "300MB" to serve in.
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
        lossless=lossless,
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
        except SnelloError:
            run.forget_beginning()
            raise
        except OSError as error:
            known = storage_error(error, request.work, "free some space; the same command goes on from here")
            if known is None:
                raise
            raise known from error
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
        check_place(request)
        recover_folder(request.output)
        if not request.dry_run:
            check_output(request)
        if not request.resume:
            shutil.rmtree(request.work, ignore_errors=True)
        self.journal = _journal(request.work)
        self.resumed = self.accepted = not self.journal.is_new
        common = {"seed": request.seed, "version": snello.__version__}
        self.worker = Worker(self.journal, interrupts, request.time_budget, common)
        self.runners = Runners(self._open)

    def _open(self, model: Any) -> Any:
        workload = Workload.fitting(model.spec)
        return self.bench.open(model, context=max(WINDOW, workload.prompt + workload.generate))

    def events(self) -> Iterator[Event]:
        request = self.request
        model = self.bench.load(request.model)
        if request.lossless:
            check_lossless(model)
        documents = texts.read_documents(request.text, model)  # what cannot be read fails before anything is packed
        original = Candidate(name="original", model=model, prefixes=(model,))
        yield from self._introduce(original)
        tools = Tools(self.bench, self.worker, self.runners, self.machine)
        examiner = yield from prepare(request, tools, original, documents)
        yield StageStarted(index=1, stage="original", predicted_seconds=0.0)
        original.select = yield from examiner.read(original, "select", "original")
        power, fault = power_of(examiner, original.select, timed=request.limits is None)
        sources = sources_of(examiner.texts, power)
        yield TextRead(
            sources=sources,
            self_written=examiner.texts.self_written,
            smallest_provable=power.worst,
            max_loss=request.max_loss,
            measure=examiner.ruler.name,
        )
        blind = not power.enough or not catches(examiner, original.select, fault)
        if blind and not request.lossless:  # where nothing can be lost, nothing has to be seen
            self.journal.clear()
            sentence = BLIND if power.enough else power.sentence
            yield Finished(result=Result(exit_code=4, sentence=sentence, reason=sentence, seconds=self._seconds))
            return
        if request.dry_run:
            yield from self._dry_run(examiner)
            return
        self.accepted = True
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
            task=model.spec.task,
        )
        if model.note:
            yield Warned(message=model.note, hint="losses are against these numbers; they are the original here")
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

    # ---- ends

    def _dry_run(self, examiner: Examiner) -> Iterator[Event]:
        """The plan, with costs predicted from ceilings; the text was read once, to say what it can prove."""
        found = plan(Climb(examiner, self.journal, power=None, fault=None, sources=()))
        yield found
        if not self.resumed:
            self.journal.clear()
        running = sum(stage.runs for stage in found.stages)
        sentence = f"would try {running} stages in about {in_words(found.predicted_seconds)}; nothing was changed"
        yield Finished(result=Result(exit_code=0, sentence=sentence, reason="dry run", seconds=self._seconds))

    def stopped(self) -> Result:
        sentence = "interrupted: everything finished is kept; the same command goes on from here"
        return Result(exit_code=130, sentence=sentence, reason="interrupted", seconds=self._seconds)

    def forget_beginning(self) -> None:
        """A wish that cannot be granted leaves nothing behind, unless it began long ago."""
        if not self.accepted:
            self.journal.clear()

    def close(self) -> None:
        if not self.worker.abandoned:  # else a thread may still be inside of them
            self.runners.close()
        self.journal.close()


def _journal(folder: Path) -> Journal:
    try:
        return Journal(folder)
    except OSError as error:
        hint = "free some space, or give another --output"
        message = f"{folder} cannot be made: {error.strerror}"
        raise storage_error(error, folder, hint) or SnelloError(message, hint) from error


def run(model: str | Path | None = None, **options: Any) -> Result:
    """`optimize` to its end; the stream's last event as a `Result`."""
    last: Event | None = None
    on_event = options.pop("on_event", None)
    for last in optimize(model, **options):
        if on_event is not None:
            on_event(last)
    assert isinstance(last, Finished)
    return last.result
