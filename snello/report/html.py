"""One HTML file: no script, no network, no font; readable from an attachment, on paper, in the dark.

Text from receipts (a model's words, a user's file names) is escaped at one place, `_text`. The policy in the head
forbids the file to call anyone.
"""

from __future__ import annotations

import re
from html import escape

from snello.report.blocks import Block, Chart, Command, Excerpt, Items, Page, Section, Table, Text

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """\
:root{color-scheme:light dark;--line:#8886;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:58rem;margin:2rem auto;padding:0 1rem;overflow-wrap:break-word}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}
#claim>p:first-of-type{font-size:1.25rem}nav a{white-space:nowrap;line-height:1.8}
:focus-visible{outline:3px solid #0072B2;outline-offset:2px}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.25rem 1rem .25rem 0;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}td{min-width:8rem}
td:first-child,th:first-child{position:sticky;left:0;background:Canvas;min-width:6rem}
td.n,th.n{text-align:right;min-width:0}td.n{white-space:nowrap;font-variant-numeric:tabular-nums}
td.h{font:.75rem/1.9 ui-monospace,monospace;overflow-wrap:anywhere;min-width:16rem}
pre,.side{font:.85rem/1.6 ui-monospace,monospace;background:var(--soft);padding:.6rem;margin:.5rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere}.side{white-space:break-spaces;overflow-wrap:anywhere;min-width:0}
.passage{margin:1.5rem 0;break-inside:avoid}.passage p{margin:0}.peaks{font-size:.9rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 .8rem}.side b{display:block;font-family:system-ui,sans-serif}
i{font-style:normal;text-decoration:underline #D55E00;text-underline-offset:.2em}
mark{background:#E69F0059;color:inherit}
.a{text-decoration-thickness:1px}.b{text-decoration-thickness:2px}.c{text-decoration-thickness:3px}
.d{text-decoration-thickness:4px}.e{text-decoration-thickness:6px}
summary{cursor:pointer;padding:.25rem 0}details{font-size:.9rem;margin:.5rem 0}
figure{margin:1rem 0}svg{display:block;width:100%;min-width:32rem;height:auto;fill:currentColor}
svg text{font:12px system-ui,sans-serif}
.axis,.whisker{stroke:currentColor;fill:none}.grid{stroke:var(--line);stroke-width:.5}
.budget{stroke:#D55E00;stroke-dasharray:5 4}.tie{stroke:#8886;stroke-width:9;stroke-linecap:round}
.front,.curve{stroke:currentColor;fill:none;stroke-width:1.5}
@media(max-width:40rem){.pair{grid-template-columns:1fr}}
@media print{body{max-width:none;margin:0;font-size:11pt}nav{display:none}svg{min-width:0}.scroll{overflow:visible}
td{min-width:0;overflow-wrap:anywhere}td.n{white-space:normal;overflow-wrap:normal}td.h{min-width:0;font-size:6.5pt}
details::details-content{content-visibility:visible;block-size:auto}
h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
HASH = re.compile(r"[0-9a-f]{40,}")
THICKNESS = ("", "a", "b", "c", "d", "e")


def render(page: Page) -> str:
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(page.title)}</title><style>{STYLE}</style></head><body>"
    )
    links = " · ".join(f'<a href="#{s.key}">{_text(s.title)}</a>' for s in page.sections)
    body = "\n".join(_section(section) for section in page.sections)
    return f"{head}<h1>{_text(page.title)}</h1><nav>{links}</nav>\n<main>{body}\n</main></body></html>\n"


def _section(section: Section) -> str:
    about = f"<details><summary>how to read this</summary><p>{_text(section.about)}</p></details>"
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.key}"><h2>{_text(section.title)}</h2>\n{blocks}\n{about}</section>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Command):
        return f"<pre>{_text(block.text)}</pre>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        data = f"<details><summary>data: {_text(block.title)}</summary>{_table(block.table)}</details>"
        return f"<figure>{_scrolling(block.svg, block.title)}</figure>{data}"
    return _excerpt(block)


def _table(table: Table) -> str:
    head = "".join(_cell('th scope="col"', name, place in table.right) for place, name in enumerate(table.columns))
    rows = "".join(
        "<tr>" + "".join(_cell("td", cell, place in table.right) for place, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    drawn = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return _scrolling(drawn, f"table: {table.columns[0]}")


def _scrolling(content: str, name: str) -> str:
    """What is wider than a telephone scrolls by itself, by finger and by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(name)}">{content}</div>'


def _cell(tag: str, text: str, right: bool) -> str:
    kind = ' class="n"' if right else ' class="h"' if HASH.fullmatch(text) else ""
    return f"<{tag}{kind}>{_text(text)}</{tag.split()[0]}>"


def _excerpt(excerpt: Excerpt) -> str:
    sides = (("original", excerpt.original, (False,) * len(excerpt.tokens)), ("lean", excerpt.lean, excerpt.lost))
    columns = "".join(
        f'<div class="side"><b>{name}</b>{_underlined(excerpt.tokens, weights, lost)}</div>'
        for name, weights, lost in sides
    )
    words = f'<p>{_text(excerpt.caption)}</p><p class="peaks">{_text(excerpt.peaks)}</p>'
    return f'<div class="passage">{words}<div class="pair">{columns}</div></div>'


def _underlined(tokens: tuple[str, ...], weights: tuple[int, ...], lost: tuple[bool, ...]) -> str:
    parts = []
    for token, weight, worse in zip(tokens, weights, lost, strict=True):
        part = f'<i class="{THICKNESS[weight]}">{_text(token)}</i>' if weight else _text(token)
        parts.append(f"<mark>{part}</mark>" if worse else part)
    return "".join(parts)


def _text(text: str) -> str:
    return escape(text, quote=True)
