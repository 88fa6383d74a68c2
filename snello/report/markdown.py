"""The same report as Markdown: a model card, a comment on a pull request. Charts become their data."""

from __future__ import annotations

import re

from snello.report.blocks import Block, Chart, Command, Excerpt, Items, Page, Section, Table, Text


def render(page: Page) -> str:
    return f"# {_escape(page.title)}\n\n" + "\n".join(_section(section) for section in page.sections)


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"## {_escape(section.title)}\n\n{blocks}\n*{_escape(section.about)}*\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _escape(block.text) + "\n"
    if isinstance(block, Items):
        return "".join(f"- {_escape(line)}\n" for line in block.lines)
    if isinstance(block, Command):
        return fenced(block.text)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        return f"**{_escape(block.title)}**\n\n{_table(block.table)}"
    return _excerpt(block)


def _table(table: Table) -> str:
    rule = ["---:" if place in table.right else "---" for place in range(len(table.columns))]
    rows = [[_cell(cell) for cell in row] for row in (table.columns, *table.rows)]
    rows.insert(1, rule)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _excerpt(excerpt: Excerpt) -> str:
    return f"{_escape(excerpt.caption)}\n{_escape(excerpt.peaks)}\n\n{fenced(''.join(excerpt.tokens))}"


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def _cell(text: str) -> str:
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    """Text that Markdown leaves alone: no markup, no HTML."""
    return re.sub(r"([\\`*_\[\]<>#&~$])", r"\\\1", text)
