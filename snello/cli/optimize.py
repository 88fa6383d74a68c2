"""`snello optimize MODEL`: the main job. Renders the events of a run; decides nothing."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.options import duration, percent, ratio
from snello.cli.techniques import require_torch
from snello.errors import SnelloError
from snello.terminal import Terminal

if TYPE_CHECKING:
    from snello.optimize.events import Result

EXAMPLES = (
    "snello optimize demo",
    "snello optimize Qwen/Qwen3-0.6B --text yours.txt --max-loss 1% --goal latency",
    "snello optimize Qwen/Qwen3-0.6B --recipe recipes/quantize-int8.toml -o lean/qwen3",
    "snello optimize Qwen/Qwen3-0.6B --text yours.txt --dry-run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face name, or demo")
    common = parser.add_argument_group("most used")
    common.add_argument(
        "--text", type=Path, action="append", metavar="FILE", help="your text; repeatable: the worst counts"
    )
    common.add_argument(
        "--max-loss", type=percent, default=0.01, metavar="1%%", help="most that it may get worse [1%%]"
    )
    goals = ("latency", "throughput", "memory")
    common.add_argument("--goal", choices=goals, default="latency", help="what has to improve [latency]")
    common.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the lean folder goes [lean/MODEL]")
    common.add_argument("--time-budget", type=duration, default=1800.0, metavar="30m", help="covers everything [30m]")
    rest = parser.add_argument_group("the rest")
    rest.add_argument("--recipe", type=Path, metavar="FILE", help="these stages, instead of a search")
    rest.add_argument("--target", type=ratio, metavar="2x", help="exit 3 and leave nothing if less is reached")
    rest.add_argument("--strict", action="store_true", help="the guards decide too: divergence, looping, ending")
    rest.add_argument("--metric", metavar="COMMAND", help="your own score per example; {url} is the model's address")
    rest.add_argument("--seed", type=int, default=0, help="[0]")
    rest.add_argument("--dry-run", action="store_true", help="say what would be tried, and stop")
    rest.add_argument("--fresh", action="store_true", help="do not continue a run that was stopped")
    rest.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    require_torch("optimize")
    from snello.cli.ladder import Ladder
    from snello.optimize import optimize
    from snello.optimize.events import Finished

    output = arguments.output or default_output(arguments.model)
    if output.exists() and not (arguments.overwrite or arguments.dry_run):
        raise SnelloError(f"{output} is there already", "--overwrite replaces it, -o names another")
    events = optimize(
        arguments.model,
        text=arguments.text,
        max_loss=arguments.max_loss,
        goal=arguments.goal,
        output=output,
        recipe=arguments.recipe,
        time_budget=arguments.time_budget,
        strict=arguments.strict,
        metric=arguments.metric,
        target=arguments.target,
        dry_run=arguments.dry_run,
        seed=arguments.seed,
        resume=not arguments.fresh,
    )
    ladder, result = Ladder(terminal, arguments.goal), None
    try:
        for event in events:
            if isinstance(event, Finished):
                result = event.result
                _write_report(result)
            elif terminal.json:
                terminal.document(event.to_json())
            ladder.show(event)
    except KeyboardInterrupt:
        terminal.clear_footer()
        raise KeyboardInterrupt(f"what was done is kept; the same command continues:\n{command_line()}") from None
    assert result is not None, "a run ends with its result"
    if result.exit_code == 130:
        terminal.say(f"continue: {command_line()}")
    fields = result.to_json()
    return {"exit": fields.pop("exit_code"), **fields}


def default_output(model: str) -> Path:
    """lean/qwen3-0.6b for Qwen/Qwen3-0.6B."""
    return Path("lean") / (Path(model).name.lower() or "model")


def command_line() -> str:
    """The command under way, so that it can be pasted."""
    return shlex.join(["snello", *sys.argv[1:]])


def _write_report(result: Result) -> None:
    if result.path is not None:
        from snello.report.write import write_report

        write_report(result.path)
