"""`snello optimize MODEL`: the main job. Renders the events of a run; decides nothing."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.options import at_least, duration, percent, target
from snello.cli.techniques import require_torch
from snello.terminal import Terminal

if TYPE_CHECKING:
    from snello.optimize.events import Event

EXAMPLES = (
    "snello optimize demo",
    "snello optimize Qwen/Qwen3-0.6B --text yours.txt --max-loss 1% --goal latency",
    "snello optimize Qwen/Qwen3-0.6B --recipe recipes/quantize-int8.toml -o lean/qwen3",
    "snello optimize Qwen/Qwen3-0.6B --text yours.txt --dry-run",
)

WISHES = (
    "model",
    "text",
    "max_loss",
    "goal",
    "output",
    "recipe",
    "time_budget",
    "strict",
    "metric",
    "lossless",
    "target",
    "dry_run",
    "seed",
    "overwrite",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a folder, a Hugging Face name, or demo [the recipe's]")
    add = parser.add_argument_group("most used").add_argument
    add("--text", type=Path, action="append", metavar="FILE", help="your text; repeatable: the worst counts")
    add("--max-loss", type=percent, metavar="1%", help="most that it may get worse [1%%]")
    add("--goal", choices=("latency", "throughput", "memory"), help="what has to improve [latency]")
    add("-o", "--output", type=Path, metavar="DIR", help="where the lean folder goes [lean/MODEL]")
    add("--time-budget", type=duration, metavar="30m", help="covers everything [30m]")
    add = parser.add_argument_group("the rest").add_argument
    add("--recipe", type=Path, metavar="FILE", help="these stages, instead of a search")
    add(
        "--target",
        type=target,
        metavar="2x|300MB",
        help="enough, by the goal; exit 3 if not reached",
    )
    add("--strict", action="store_true", default=None, help="the guards decide too: divergence, looping, ending")
    add("--metric", metavar="COMMAND", help="your own score per example; {model} is its folder")
    add("--lossless", action="store_true", default=None, help="a lean model drafts; the answers stay the original's")
    add("--seed", type=at_least(0), help="[0]")
    add("--dry-run", action="store_true", help="say what would be tried, and stop")
    add("--fresh", action="store_true", help="do not continue a run that was stopped")
    add("--overwrite", action="store_true", help="replace the folder if it is there")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    require_torch("optimize")
    from snello.optimize import optimize

    return follow(optimize(**_wishes(arguments)), arguments.goal, terminal)


def follow(events: Iterator[Event], goal: str | None, terminal: Terminal) -> dict[str, Any]:
    """Shows a run to its end; its result as the fields of the last line."""
    from snello.cli.ladder import Ladder
    from snello.optimize.events import Finished

    ladder, result = Ladder(terminal, goal or "latency"), None
    try:
        for event in events:
            if isinstance(event, Finished):
                result = event.result
            elif terminal.json:
                terminal.document(event.to_json())
            ladder.show(event)
    except KeyboardInterrupt:  # the second, or SIGTERM: at once
        terminal.clear_footer()
        raise KeyboardInterrupt(f"what was finished is kept; this continues: {command_line()}") from None
    assert result is not None, "a run ends with its result"
    if result.exit_code == 130:
        terminal.always(f"continue: {command_line()}")
    fields = result.to_json()
    return {"exit": fields.pop("exit_code"), **fields}


def _wishes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked, by the names of `optimize`; None leaves it to the recipe, then to the default."""
    wishes = {name: getattr(arguments, name) for name in WISHES}
    command = ["snello", *sys.argv[1:]]
    return {**wishes, "resume": not arguments.fresh, "command": command, "finish": write_pages}


def write_pages(folder: Path) -> None:
    """Pages are written into the folder before it is put in place, so that it is never without them."""
    from snello.report.write import write_report

    write_report(folder)


def command_line() -> str:
    """The command under way, so that it can be pasted."""
    return shlex.join(["snello", *sys.argv[1:]])
