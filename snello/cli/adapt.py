"""`snello adapt MODEL --data D -o OUT`: an adapter for a task, written only if it beats its base; or one merged."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from snello.cli.options import add_options, build
from snello.cli.techniques import require_torch
from snello.errors import SnelloError
from snello.report import numbers
from snello.techniques.adapt import Adapt
from snello.terminal import Terminal, bar

EXAMPLES = (
    "snello adapt demo --data answers.jsonl -o adapters/answers",
    "snello adapt Qwen/Qwen3-0.6B --data reviews.tsv --rank 16 -o adapters/reviews",
    "snello adapt demo --adapter adapters/answers --merge -o models/demo-answers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the base: a folder, a Hugging Face name, or demo")
    parser.add_argument("--data", type=Path, help="JSONL (prompt, completion; text, label), TSV (text, label), or text")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter that is there, to be merged")
    parser.add_argument("--merge", action="store_true", help="write the model with the adapter in it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--threads", type=int, help="[torch's own]")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    add_options(parser, Adapt, "the adapter")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    options = build(Adapt, arguments)
    _check(arguments)
    from snello.models import load

    model = load(arguments.model)
    if arguments.adapter is not None:
        return _merge(arguments, terminal, model)
    require_torch("adapt")
    from snello.optimize.adapt import adapt

    def progress(message: str, fraction: float) -> None:
        terminal.footer([f"  {bar(fraction)} {fraction:4.0%}  {message}"])

    done = adapt(
        model,
        arguments.data,
        options,
        arguments.output,
        merged=arguments.merge,
        seed=arguments.seed,
        threads=arguments.threads,
        progress=progress,
    )
    terminal.clear_footer()
    dropped = f" ({done.dropped} dropped: they stand in held-out text)" if done.dropped else ""
    terminal.say(f"{numbers.count(done.parameters)} parameters learned from {done.examples} examples{dropped}")
    terminal.say(done.verdict.sentence())
    terminal.product(str(done.path))
    fields = {"path": str(done.path), "verdict": dataclasses.asdict(done.verdict), "examples": done.examples}
    return {**fields, "parameters": done.parameters, "seconds": done.seconds, "digest": done.digest}


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.data is None) == (arguments.adapter is None):
        raise SnelloError("give --data to train, or --adapter to merge", EXAMPLES[0], exit_code=2)
    if arguments.adapter is not None and not arguments.merge:
        raise SnelloError("what is to be done with this adapter?", "--merge puts it into the model", exit_code=2)
    if arguments.output.exists() and not arguments.overwrite:
        raise SnelloError(f"{arguments.output} is there already", "--overwrite replaces it")


def _merge(arguments: argparse.Namespace, terminal: Terminal, model: Any) -> dict[str, Any]:
    from snello.models.adapter import read_adapter
    from snello.techniques.adapt.merge import merge

    merged = merge(model, read_adapter(arguments.adapter, model), arguments.output)
    terminal.product(str(arguments.output))
    terminal.say(f"try it: snello run {arguments.output}")
    return {"path": str(arguments.output), "digest": merged.digest}
