"""What was asked of `optimize`, with every default filled in and every impossible wish refused before work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snello.errors import SnelloError
from snello.measure.metric import check_command
from snello.measure.text import Limits
from snello.optimize.files import check_exchangeable
from snello.optimize.recipe import GOALS, Recipe, nearest, share
from snello.optimize.target import Target

MAX_LOSS = 0.01
TIME_BUDGET_SECONDS = 1800.0
PUBLISHING = "publishing"  # in the work folder from just before the output folder is exchanged


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run's wishes. The order of precedence: an argument, the recipe, the default."""

    model: str
    text: tuple[Path, ...]
    max_loss: float
    goal: str
    output: Path
    recipe: Recipe
    time_budget: float
    strict: bool
    metric: str | None
    lossless: bool
    target: Target | None
    seed: int
    limits: Limits | None  # None: chosen by what the time budget allows
    dry_run: bool
    resume: bool
    overwrite: bool
    command: tuple[str, ...]

    @property
    def work(self) -> Path:
        return self.output.with_name(f"{self.output.name}.work")


def resolve(
    model: str | Path | None,
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
    seed: int | None = None,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Request:
    """Arguments and recipe as one request."""
    written = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe) if recipe is not None else Recipe()
    named = str(model) if model is not None else written.model
    if named is None:
        hint = "for example: snello optimize Qwen/Qwen3-0.6B --text yours.txt"
        raise SnelloError("no model was given", hint, exit_code=2)
    texts: Any = text if text is not None else written.text
    wanted = Target.parse(target) if target is not None else written.target
    size = wanted is not None and wanted.unit == "bytes"
    paths = (texts,) if isinstance(texts, (str, Path)) else tuple(texts)
    found = Request(
        model=named,
        text=tuple(Path(path).expanduser() for path in paths),
        max_loss=share(max_loss, "max_loss") if max_loss is not None else written.max_loss or MAX_LOSS,
        goal=goal or written.goal or ("memory" if size else "latency"),
        output=Path(output).expanduser() if output is not None else default_output(named),
        recipe=written,
        time_budget=first(time_budget, written.time_seconds, TIME_BUDGET_SECONDS),
        strict=first(strict, written.strict, False),
        metric=metric if metric is not None else written.metric,
        lossless=first(lossless, written.lossless, False),
        target=wanted,
        seed=first(seed, written.seed, 0),
        limits=limits_of(written),
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        command=tuple(command),
    )
    _check(found)
    return found


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def default_output(model: str) -> Path:
    """ "Qwen/Qwen3-0.6B" -> lean/qwen3-0.6b."""
    return Path("lean") / Path(model).name.lower()


def limits_of(recipe: Recipe) -> Limits | None:
    if not recipe.data:
        return None
    known = {name.removesuffix("_tokens"): value for name, value in recipe.data.items()}
    return Limits(**known)


def _check(found: Request) -> None:
    if found.goal not in GOALS:
        raise SnelloError(f"goal is {found.goal!r}", nearest(found.goal, GOALS))
    if found.target is not None and found.target.unit == "bytes" and found.goal != "memory":
        message = f"a target of {found.target} is a size, and the goal is {found.goal}"
        raise SnelloError(message, "--goal memory, or a speed-up such as --target 2x")
    if found.lossless and found.goal == "memory":
        message = "a draft beside the original takes more memory, never less"
        raise SnelloError(message, "--goal latency or throughput, or leave out --lossless")
    if found.time_budget <= 0:
        raise SnelloError(f"a time budget of {found.time_budget:g} seconds", "give minutes, for example 30m")
    if not 0 <= found.seed < 2**63:
        raise SnelloError(f"seed is {found.seed}", "it must be at least 0 and less than 2^63")
    for path in found.text:
        if not path.exists():
            raise SnelloError(f"there is no text at {path}", "give a file, or a folder of .txt files")
    if found.metric is not None:
        check_command(found.metric)
    if found.recipe.replay is not None and not found.recipe.stages and found.recipe.replay.artifact_sha256:
        raise SnelloError("the recipe replays an artefact and has no steps", "restore its [[steps]]")


def check_place(found: Request) -> None:
    """Refuses an output that could never be put in place, or that would take something else with it."""
    check_exchangeable(found.output, [Path(found.model).expanduser(), *found.text])


def check_output(found: Request) -> None:
    """Never writes over anything that was not asked for; a run that was killed while publishing may go on."""
    if not found.output.exists() or found.overwrite or (found.work / PUBLISHING).exists():
        return
    if found.output.is_dir() and not any(found.output.iterdir()):
        return
    hint = f"use another --output, or --overwrite to replace it (it goes when the new one is whole): {found.output}"
    raise SnelloError(f"{found.output} exists", hint)
