"""A task learned, merged into the model, and that model made lean, proved and judged on the task again.

    adapt -> OUT.adapted, in full precision -> optimize, whose original it is -> the task's held-out examples -> OUT

Two questions, two answers. What making lean costs is the gate's: the lean model against the adapted one, on text. What
the task keeps is asked here, on the held-out examples, by the executor that serves: the lean adapted model against the
base made lean by the same steps. A lean model that does not beat that lean base is not put in place (exit code 3).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snello.errors import SnelloError
from snello.measure.text import Limits
from snello.models.spec import BITS
from snello.optimize import receipts
from snello.optimize.adapt import REFUSED, Adapted, adapt, asked
from snello.optimize.adapt_data import Split, read_examples, split
from snello.optimize.adapt_judge import MOST_TOKENS, Scorer, Verdict, by_runner, encode, judge_of
from snello.optimize.events import Event
from snello.optimize.files import write_atomically
from snello.optimize.make import MODEL_FILE
from snello.optimize.plain import revive
from snello.optimize.prepare import LEAST_TOKENS
from snello.optimize.receipts import TaskGain, TaskReceipt
from snello.optimize.recipe import Recipe, Step
from snello.optimize.run import optimize
from snello.optimize.texts import cut, read_documents
from snello.optimize.workbench import NativeWorkbench
from snello.techniques.base import Context, wanted_tokens

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.adapt import Adapt

TEXT = "training-examples.txt"


def adapted_folder(output: Path) -> Path:
    """Where the adapted model in full precision stays: what is lean was proved against it."""
    return output.with_name(f"{output.name}.adapted")


def adapt_or_reuse(
    model: Model,
    data: Path,
    options: Adapt,
    output: Path,
    *,
    seed: int,
    threads: int | None,
    overwrite: bool,
    progress: Callable[[str, float], None],
) -> Adapted:
    """The merged model at `adapted_folder(output)`: made, or as a run that was stopped left it.

    Raises:
        SnelloError: there is one that was made otherwise, or the adapter does not beat its base (exit code 3).
    """
    folder = adapted_folder(output)
    if folder.exists() and any(folder.iterdir()):
        known = _known(folder, model, {**asked(options, read_examples(data), seed), "base": model.digest})
        if known is not None:
            return known
        if not overwrite:
            raise SnelloError(f"{folder} is there, and was made otherwise", "--overwrite replaces it")
    return adapt(model, data, options, folder, merged=True, seed=seed, threads=threads, progress=progress)


def _known(folder: Path, base: Model, wanted: dict[str, Any]) -> Adapted | None:
    """What the folder says of itself, if it is what is wanted."""
    from snello.models.plain_folder import read_history

    history = read_history(folder)
    facts = history[-1] if history else {}
    if any(facts.get(key) != value for key, value in wanted.items()):
        return None
    return Adapted(
        path=folder,
        verdict=revive(Verdict, facts["verdict"]),
        examples=facts["examples"],
        dropped=facts["dropped"],
        parameters=facts["parameters"],
        seconds=0.0,
        digest=facts["trained"],
    )


def make_lean(
    base: Model,
    data: Path,
    adapted: Adapted,
    output: Path,
    *,
    recipe: Recipe,
    seed: int,
    threads: int | None,
    finish: Callable[[Path], None] | None,
    **wishes: Any,
) -> Iterator[Event]:
    """`optimize` of the adapted model; before its folder is put in place, the task is judged again.

    Args:
        finish: called with the complete folder, the task's receipt in it; writes the report.
        wishes: as `optimize` takes them.
    """

    def judged(folder: Path) -> None:
        if (folder / MODEL_FILE).exists():
            parts = split(read_examples(data), seed)
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                write_task(folder, base, parts, adapted.verdict, Path(work), seed=seed, threads=threads)
        if finish is not None:
            finish(folder)

    given = wishes.pop("text", None) or recipe.text
    yield from optimize(
        str(adapted.path),
        text=given or write_examples(adapted.path / TEXT, data, seed),
        output=output,
        recipe=recipe,
        seed=seed,
        finish=judged,
        workbench=NativeWorkbench(threads),
        **wishes,
    )


def check_text(model: Model, data: Path, *, given: Sequence[str | Path], seed: int, recipe: Recipe) -> None:
    """Whether there is a text that can judge the lean model; asked before anything is trained.

    How much of it is read depends on this machine's speed, so the least and the most are tried.

    Args:
        given: texts that were named; empty: the training examples are it.
        recipe: whose steps may ask for more calibration text.

    Raises:
        SnelloError: nothing of it would be left once it is cut.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in given] or [write_examples(Path(folder) / TEXT, data, seed)]
        wanted = max((wanted_tokens(step.technique) for stage in recipe.stages for step in stage.steps), default=0)
        most = Limits(calib=max(Limits().calib, wanted))
        try:
            documents = read_documents(paths, model)
            for limits in (most, dataclasses.replace(most, select=LEAST_TOKENS, proof=LEAST_TOKENS)):
                cut(documents, model, seed=seed, limits=limits, self_written=False)
        except SnelloError as error:
            if given:
                raise
            message = f"the training examples cannot judge the lean model: {error.message}"
            raise SnelloError(message, "give a text that can: --text yours.txt", exit_code=error.exit_code) from error


def write_examples(path: Path, data: Path, seed: int) -> Path:
    """The examples that are trained on, as a text: what a model writes by itself after it learned a task is short
    answers, which judge nothing.
    """
    examples = split(read_examples(data), seed).train
    write_atomically(path, "\n\n".join((one.prompt + one.completion).strip() for one in examples) + "\n")
    return path


def write_task(
    folder: Path, base: Model, parts: Split, full: Verdict, work: Path, *, seed: int, threads: int | None
) -> TaskReceipt:
    """Judges the lean model in `folder` against the lean base, and writes the receipt of it.

    Raises:
        SnelloError: the lean model does not beat the lean base (exit code 3).
    """
    from snello.models import load

    steps = [step for stage in Recipe.load(folder / "recipe.toml").stages for step in stage.steps]
    lean_base = make_base_lean(base, steps, parts, work, seed=seed, threads=threads)
    judge = judge_of(base, parts, seed)
    _ask(judge.before, lean_base, threads)
    verdict: Verdict = _ask(judge.after, load(folder), threads)
    if verdict.gain.low <= 0:
        message = f"the lean model does not beat the base made lean alike: {verdict.sentence()}"
        hint = "nothing was put in place; more bits, or more examples (a bound on few is wide)"
        raise SnelloError(message, hint, exit_code=REFUSED)
    receipt = TaskReceipt(
        index=len(list((folder / "receipts").glob("*.json"))),
        measure=verdict.measure,
        held_out=verdict.held_out,
        families=len(set(parts.families)),
        full=TaskGain(before=full.before, after=full.after, gain=full.gain),
        lean=TaskGain(before=verdict.before, after=verdict.after, gain=verdict.gain),
        base=base.digest,
        lean_base=lean_base.digest,
    )
    receipts.write(folder / "receipts", receipt.index, "task", receipt)
    return receipt


def make_base_lean(
    base: Model, steps: Sequence[Step], parts: Split, work: Path, *, seed: int, threads: int | None
) -> Model:
    """The base after the same steps, calibrated on the examples that were trained on; one of few bits stays."""
    if base.spec.formats or BITS[base.spec.default_format.weights] < 16:
        return base
    windows = _windows(base, parts)
    bench, model = NativeWorkbench(threads), base
    for number, step in enumerate(steps):
        where = work / str(number)
        context = Context(output=where, windows=windows, original=base, seed=seed, threads=threads)
        model = bench.apply(step, model, context)
    return model


def _windows(base: Model, parts: Split) -> list[np.ndarray]:
    tokens = np.concatenate([answer.tokens for example in parts.train for answer in encode(base, example)])
    length = min(MOST_TOKENS, base.spec.max_positions)
    windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [window for window in windows if len(window) == length] or windows


def _ask(question: Callable[[Scorer], Any], model: Model, threads: int | None) -> Any:
    """With the model open in the executor that serves."""
    runner = NativeWorkbench(threads).open(model, context=MOST_TOKENS)
    try:
        return question(by_runner(runner))
    finally:
        runner.close()
