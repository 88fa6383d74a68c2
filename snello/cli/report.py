"""`snello report DIR`: the receipts of a run as pages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from snello.terminal import Terminal

EXAMPLES = ("snello report lean/qwen3-0.6b", "snello report lean/qwen3-0.6b --to md >> $GITHUB_STEP_SUMMARY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="what snello optimize left")
    parser.add_argument("--to", choices=("html", "md"), default="html", help="md also prints the report [html]")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.report.write import write_report

    page = write_report(arguments.folder)
    markdown = page.with_suffix(".md")
    terminal.product(markdown.read_text(encoding="utf-8") if arguments.to == "md" else str(page))
    return {"html": str(page), "markdown": str(markdown), "data": str(page.with_suffix(".json"))}
