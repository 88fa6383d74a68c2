"""`snello adapt MODEL --data D -o OUT`: an adapter for a task, written only if it beats its base; or one merged.

A prompt that learns instead changes no weight (`--method prompt`). An encoder learns labels: as an adapter with a head,
by its head alone or with all weights (`--method`).

With `--merge --quantize int4` (or a recipe) the merged model is made lean and proved in the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.optimize import follow, write_pages
from snello.cli.options import add_options, at_least, build, duration, of_deployment, percent
from snello.cli.techniques import require_torch
from snello.errors import SnelloError, Unsupported
from snello.report import numbers
from snello.techniques.adapt import Adapt
from snello.terminal import Terminal, bar

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.optimize.adapt import Adapted

EXAMPLES = (
    "snello adapt demo --data answers.jsonl -o adapters/answers",
    "snello adapt Qwen/Qwen3-0.6B --data reviews.tsv --rank 16 -o adapters/reviews",
    "snello adapt Qwen/Qwen3-0.6B --data reviews.tsv --method prompt -o adapters/reviews",
    "snello adapt demo --data answers.jsonl --merge --quantize int8 -o lean/answers",
    "snello adapt demo --adapter adapters/answers --merge -o models/demo-answers",
    "snello adapt sentence-transformers/all-MiniLM-L6-v2 --data reviews.tsv --method full -o models/reviews",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the base: a folder, a Hugging Face name, or demo")
    parser.add_argument("--data", type=Path, help="JSONL (prompt, completion; text, label), TSV (text, label), or text")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter that is there, to be merged")
    parser.add_argument("--merge", action="store_true", help="write the model with the adapter in it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--seed", type=at_least(0), default=0, help="[0]")
    parser.add_argument("--threads", type=of_deployment("threads"), help="[torch's own]")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    add_options(parser, Adapt, "the adapter")
    add = parser.add_argument_group("the merged model made lean").add_argument
    add("--quantize", choices=("int8", "int4"), help="by rounding, if the gate keeps it")
    add("--recipe", type=Path, metavar="FILE", help="these stages instead")
    add("--text", type=Path, action="append", metavar="FILE", help="judges the loss [the training examples]")
    add("--max-loss", type=percent, metavar="1%", help="most that it may get worse than the adapted model [1%%]")
    add("--goal", choices=("latency", "throughput", "memory"), help="what has to improve [latency]")
    add("--time-budget", type=duration, metavar="30m", help="covers making it lean [30m]")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    options = build(Adapt, arguments)
    _check(arguments)
    if options.method == "prompt" and arguments.merge and arguments.adapter is None:
        hint = "leave out --merge: run and serve take it as it is (--adapter)"
        raise SnelloError("a prompt changes no weight: it cannot be merged", hint, exit_code=2)
    from snello.models import load

    model = load(arguments.model)
    if arguments.adapter is not None:
        return _merge(arguments, terminal, model)
    require_torch("adapt")
    from snello.optimize.adapt import adapt

    def progress(message: str, fraction: float) -> None:
        terminal.footer([f"  {bar(fraction)} {fraction:4.0%}  {message}"])

    how: dict[str, Any] = {"seed": arguments.seed, "threads": arguments.threads}
    if _lean(arguments):
        return _make_lean(arguments, terminal, model, options, {**how, "progress": progress})
    done = adapt(model, arguments.data, options, arguments.output, merged=arguments.merge, progress=progress, **how)
    _tell(terminal, done)
    if options.method == "lora" and options.weight_decomposed and not arguments.merge:
        terminal.say(f"it runs merged: snello adapt {arguments.model} --adapter {done.path} --merge -o DIR")
    terminal.product(str(done.path))
    fields = {"path": str(done.path), "verdict": dataclasses.asdict(done.verdict), "examples": done.examples}
    return {**fields, "parameters": done.parameters, "seconds": done.seconds, "digest": done.digest}


def _tell(terminal: Terminal, done: Adapted) -> None:
    terminal.clear_footer()
    dropped = f" ({done.dropped} dropped: they stand in held-out text)" if done.dropped else ""
    terminal.say(f"{numbers.count(done.parameters)} parameters learned from {done.examples} examples{dropped}")
    terminal.say(done.verdict.sentence())


def _lean(arguments: argparse.Namespace) -> bool:
    return arguments.quantize is not None or arguments.recipe is not None


def _make_lean(
    arguments: argparse.Namespace, terminal: Terminal, model: Model, options: Adapt, how: dict[str, Any]
) -> dict[str, Any]:
    if not model.spec.causal:
        hint = f"--merge alone, then snello optimize {arguments.output} --text {arguments.data} -o lean"
        raise Unsupported(f"{model.name} is an encoder, which is judged by labelled text", hint)
    from snello.optimize.adapt_lean import adapt_or_reuse, check_text, make_lean
    from snello.optimize.recipe import Recipe, Stage, Step

    if arguments.recipe is not None:
        recipe = Recipe.load(arguments.recipe)
    else:
        step = Step("quantize", {"weights": arguments.quantize})
        recipe = Recipe(stages=(Stage(f"quantize {arguments.quantize}", (step,)),))
    check_text(model, arguments.data, given=arguments.text or recipe.text, seed=arguments.seed, recipe=recipe)
    done = adapt_or_reuse(model, arguments.data, options, arguments.output, overwrite=arguments.overwrite, **how)
    _tell(terminal, done)
    terminal.say(f"adapted model in full precision: {done.path}\n")
    events = make_lean(
        model,
        arguments.data,
        done,
        arguments.output,
        recipe=recipe,
        seed=arguments.seed,
        threads=arguments.threads,
        finish=functools.partial(_finish, terminal),
        text=arguments.text,
        max_loss=arguments.max_loss,
        goal=arguments.goal,
        time_budget=arguments.time_budget,
        overwrite=arguments.overwrite,
        command=["snello", *sys.argv[1:]],
    )
    result = follow(events, arguments.goal, terminal)
    return {**result, "adapted": str(done.path), "verdict": dataclasses.asdict(done.verdict)}


def _finish(terminal: Terminal, folder: Path) -> None:
    from snello.optimize.receipts import read

    task = read(folder).task
    if task is not None:
        bounds = numbers.task_gain(task.measure, task.lean.gain)
        terminal.clear_footer()
        terminal.say(f"\nthe task, lean over the base made lean alike: {bounds} on {task.held_out} held-out examples")
    write_pages(folder)


def _check(arguments: argparse.Namespace) -> None:
    from snello.optimize.files import check_exchangeable

    if (arguments.data is None) == (arguments.adapter is None):
        raise SnelloError("give --data to train, or --adapter to merge", EXAMPLES[0], exit_code=2)
    if arguments.adapter is not None and not arguments.merge:
        raise SnelloError("what is to be done with this adapter?", "--merge puts it into the model", exit_code=2)
    if _lean(arguments) and (arguments.data is None or not arguments.merge):
        hint = "--data D --merge, or snello optimize of a merged model"
        raise SnelloError("only a model that learns here and is merged can be made lean", hint, exit_code=2)
    if arguments.quantize is not None and arguments.recipe is not None:
        raise SnelloError("--quantize is a recipe of one step", "give one of --quantize and --recipe", exit_code=2)
    only = [name for name in ("text", "max_loss", "goal", "time_budget") if getattr(arguments, name) is not None]
    if only and not _lean(arguments):
        flag = f"--{only[0].replace('_', '-')}"
        raise SnelloError(f"{flag} goes with --quantize or --recipe", EXAMPLES[3], exit_code=2)
    if arguments.output.exists() and not arguments.overwrite:
        raise SnelloError(f"{arguments.output} is there already", "--overwrite replaces it")
    given = (Path(arguments.model).expanduser(), arguments.data, arguments.adapter, *(arguments.text or []))
    check_exchangeable(arguments.output, [path for path in given if path is not None])


def _merge(arguments: argparse.Namespace, terminal: Terminal, model: Any) -> dict[str, Any]:
    from snello.models.adapter import read_adapter
    from snello.techniques.adapt.merge import merge

    merged = merge(model, read_adapter(arguments.adapter, model), arguments.output)
    terminal.product(str(arguments.output))
    terminal.say(f"try it: snello run {arguments.output}")
    return {"path": str(arguments.output), "digest": merged.digest}
