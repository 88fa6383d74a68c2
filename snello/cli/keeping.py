"""Flags that give up old keys and values, and what is said wherever they do."""

from __future__ import annotations

import argparse
from typing import Any

from snello.cli.options import of_deployment
from snello.errors import SnelloError
from snello.models.spec import Deployment
from snello.report import numbers
from snello.terminal import Terminal


def add_keeping(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--keep-last",
        type=of_deployment("keep_last"),
        metavar="N",
        help="see only the newest N tokens: less memory, less recall [all]",
    )
    add(
        "--keep-first",
        type=of_deployment("keep_first"),
        default=0,
        metavar="N",
        help="and the first N, as instructions are [0]",
    )


def check_keeping(arguments: argparse.Namespace) -> None:
    if arguments.keep_first and arguments.keep_last is None:
        raise SnelloError("--keep-first goes with --keep-last", "say how many of the newest to see", exit_code=2)


def say_what_is_kept(deployment: Deployment, terminal: Terminal) -> None:
    """Before the answer; nothing where everything is kept."""
    from snello.engine.eviction import sentence

    if deployment.keep_last is not None:
        terminal.say(sentence(deployment))


def forgetting(deployment: Deployment, length: int, terminal: Terminal) -> dict[str, Any]:
    """After it: how much of a text of this length was out of sight at its end."""
    from snello.engine.eviction import forgotten

    if deployment.keep_last is None:
        return {}
    lost = forgotten(deployment, length)
    if lost:
        terminal.say(f"{numbers.count(lost)} of {numbers.count(length)} tokens were out of sight at the end")
    return {"keep_first": deployment.keep_first, "keep_last": deployment.keep_last, "forgotten_tokens": lost}
