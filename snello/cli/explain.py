"""`snello explain TECHNIQUE`: the manual page that lives in the code: idea, formula, options, where more is written."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from snello.cli import apply
from snello.cli.options import option_rows
from snello.cli.techniques import lookup, names
from snello.terminal import Terminal, table

EXAMPLES = ("snello explain quantize",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("technique", metavar="TECHNIQUE", help=names())


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    technique = lookup(arguments.technique)
    text = inspect.getdoc(technique) or ""
    rows = list(option_rows(technique))
    page = f"docs/{arguments.technique}.md"
    terminal.product(f"{arguments.technique}\n\n{text}\n\noptions")
    for flag, values, default, sentence in rows:
        terminal.product(f"  {flag} {values} [{default}]")
        terminal.product(f"      {sentence}")
    alone = next(example for example in apply.EXAMPLES if example.split()[2] == arguments.technique)
    more = [("alone", alone), ("more", page)]
    terminal.product("\n" + "\n".join(table(more)))
    names = ("flag", "values", "default", "help")
    options = [dict(zip(names, row, strict=True)) for row in rows]
    return {"technique": arguments.technique, "text": text, "options": options, "page": page}
