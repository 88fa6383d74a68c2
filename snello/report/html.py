"""One HTML file: no script, no network, no font; readable from an attachment, on paper, in the dark.

Text from receipts (a model's words, a user's file names) is escaped at one place, `_text`. The policy in the head
forbids the file to call anyone.
"""

from __future__ import annotations

from html import escape

from snello.report.blocks import Block, Chart, Command, Excerpt, Page, Section, Table, Text

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """\
:root{color-scheme:light dark;--line:#8886;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:54rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}
#claim p:first-of-type{font-size:1.25rem}
table{border-collapse:collapse;width:100%;margin:1rem 0;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}
pre,.side{font:.85rem/1.6
ui-monospace,monospace;background:var(--soft);padding:.6rem}
pre,.side{white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}.side b{display:block;font-family:system-ui,sans-serif}
i{font-style:normal;text-decoration:underline #D55E00;text-underline-offset:.2em}
.a{text-decoration-thickness:1px}.b{text-decoration-thickness:2px}.c{text-decoration-thickness:3px}
.d{text-decoration-thickness:4px}.e{text-decoration-thickness:6px}
summary{cursor:pointer}details{font-size:.9rem;margin:.5rem 0} svg{width:100%;height:auto;font:12px
system-ui,sans-serif;fill:currentColor}
.axis,.whisker{stroke:currentColor;fill:none}.grid{stroke:var(--line);stroke-width:.5}
.budget{stroke:#D55E00;stroke-dasharray:5 4}.tie{stroke:#8886;stroke-width:9;stroke-linecap:round}
.front,.curve{stroke:currentColor;fill:none;stroke-width:1.5} @media(max-width:40rem){.pair{grid-template-columns:1fr}}
@media print{body{max-width:none}details{display:block}h2{break-after:avoid}svg,tr{break-inside:avoid}}
"""
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
    return f"{head}<h1>{_text(page.title)}</h1><nav>{links}</nav>\n{body}\n</body></html>\n"


def _section(section: Section) -> str:
    about = f"<details><summary>how to read this</summary><p>{_text(section.about)}</p></details>"
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.key}"><h2>{_text(section.title)}</h2>\n{blocks}\n{about}</section>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Command):
        return f"<pre>{_text(block.text)}</pre>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        data = f"<details><summary>data: {_text(block.title)}</summary>{_table(block.table)}</details>"
        return f"<figure>{block.svg}</figure>{data}"
    return _excerpt(block)


def _table(table: Table) -> str:
    head = "".join(_cell("th", name, place in table.right) for place, name in enumerate(table.columns))
    rows = "".join(
        "<tr>" + "".join(_cell("td", cell, place in table.right) for place, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(tag: str, text: str, right: bool) -> str:
    return f'<{tag} class="n">{_text(text)}</{tag}>' if right else f"<{tag}>{_text(text)}</{tag}>"


def _excerpt(excerpt: Excerpt) -> str:
    sides = (("original", excerpt.original), ("lean", excerpt.lean))
    columns = "".join(
        f'<div class="side"><b>{name}</b>{_underlined(excerpt.tokens, weights)}</div>' for name, weights in sides
    )
    return f'<p>{_text(excerpt.caption)}</p><div class="pair">{columns}</div>'


def _underlined(tokens: tuple[str, ...], weights: tuple[int, ...]) -> str:
    parts = []
    for token, weight in zip(tokens, weights, strict=True):
        parts.append(f'<i class="{THICKNESS[weight]}">{_text(token)}</i>' if weight else _text(token))
    return "".join(parts)


def _text(text: str) -> str:
    return escape(text, quote=True)
