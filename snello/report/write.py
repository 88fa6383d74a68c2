"""Writes the pages of a folder that `optimize` left: report.html, report.md, report.json and verify.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snello.optimize.events import plain
from snello.optimize.files import write_atomically
from snello.optimize.receipts import Receipts, read
from snello.report import html, markdown
from snello.report.blocks import Block, Page, Section
from snello.report.sections import page

SCHEMA = 1
VERIFY = Path(__file__).with_name("verify_template.py")


def write_report(folder: Path) -> Path:
    """Renders the receipts of `folder` into it and returns the path of report.html.

    Raises:
        SnelloError: the folder holds no receipts.
    """
    receipts = read(folder)
    arranged = page(receipts)
    write_atomically(folder / "report.html", html.render(arranged))
    write_atomically(folder / "report.md", markdown.render(arranged))
    write_atomically(
        folder / "report.json", json.dumps(to_json(arranged, receipts), indent=1, ensure_ascii=False) + "\n"
    )
    if (folder / "proof.json").exists():
        write_atomically(folder / "verify.py", VERIFY.read_text(encoding="utf-8"))
    return folder / "report.html"


def to_json(arranged: Page, receipts: Receipts) -> dict[str, Any]:
    """The sections as they are printed, and the receipts that they were printed from."""
    return {
        "schema": SCHEMA,
        "title": arranged.title,
        "sections": [_section(section) for section in arranged.sections],
        "run": plain(receipts.run),
        "proof": plain(receipts.proof),
    }


def _section(section: Section) -> dict[str, Any]:
    return {**asdict(section), "blocks": [_block(block) for block in section.blocks]}


def _block(block: Block) -> dict[str, Any]:
    """Named by its kind, without the drawing: its table holds what it shows."""
    fields = {key: value for key, value in asdict(block).items() if key != "svg"}
    return {"kind": type(block).__name__.lower(), **fields}
