"""What the command line knows about the terminal it talks to, and the few things it draws there.

Two streams with two jobs: stdout carries the product (text, a table, JSON), stderr the conversation. Whether either is
a terminal decides looks only, never abilities. Nothing here knows models; there is no dependency, no emoji, no spinner:
finished lines stay in the scrollback and only a footer of a few lines is redrawn.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

SCHEMA = 1  # of the JSON documents on stdout; fields are only ever added


class Terminal:
    """Both streams of one call.

    Attributes:
        json: stdout carries JSON documents only; what people read is left out there.
        quiet, verbose: -q leaves errors and the last sentence, -v adds detail.
        live: a footer may be redrawn on stderr.
    """

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.live = (
            is_terminal(self.err) and os.environ.get("TERM") != "dumb" and not os.environ.get("CI") and not quiet
        )
        self.color = wants_color(self.err)
        self._footer_lines = 0

    @property
    def width(self) -> int:
        return max(40, shutil.get_terminal_size((100, 24)).columns)

    def glyph(self, fine: str, plain: str) -> str:
        """`fine` where the encoding of stderr can say it, else `plain`."""
        return fine if _can_encode(self.err, fine) else plain

    # ---- stdout

    def product(self, text: str = "", end: str = "\n") -> None:
        """What the user asked for. Left out with --json, whose one document says it."""
        if not self.json:
            self.out.write(text + end)
            self.out.flush()

    def document(self, fields: Mapping[str, Any]) -> None:
        """One JSON document on one line of stdout."""
        self.out.write(json.dumps(_finite({"schema": SCHEMA, **fields}), allow_nan=False) + "\n")
        self.out.flush()

    # ---- stderr

    def say(self, text: str = "", end: str = "\n") -> None:
        if not self.quiet:
            self.always(text, end)

    def detail(self, text: str) -> None:
        if self.verbose:
            self.always(text)

    def always(self, text: str, end: str = "\n") -> None:
        self.clear_footer()
        self.err.write(text + end)
        self.err.flush()

    def footer(self, lines: Sequence[str]) -> None:
        """Redraws the last lines of a live terminal; draws nothing elsewhere."""
        if not self.live:
            return
        self.clear_footer()
        for line in lines:
            self.err.write(line[: self.width - 1] + "\n")
        self.err.flush()
        self._footer_lines = len(lines)

    def clear_footer(self) -> None:
        if self._footer_lines:
            self.err.write(f"\x1b[{self._footer_lines}A\x1b[J")
            self._footer_lines = 0

    def mark(self, text: str) -> str:
        """`text` so that it stands out: inverted on a terminal with colours, else in brackets."""
        return f"\x1b[7m{text}\x1b[0m" if self.color else f"[{text}]"


def prepare_streams() -> None:
    """A character that the stream's encoding cannot say becomes `?` and never ends a run; a closed stream is empty.

    A byte of stdin that is not text is kept, as in arguments: the tokenizer says so.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # `>&-`; taken now, its number does not become that of a file
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)


def is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def wants_color(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def bar(fraction: float, width: int = 20) -> str:
    """`[#####...............]`"""
    filled = round(max(0.0, min(1.0, fraction)) * width)
    return "[" + "#" * filled + "." * (width - filled) + "]"


def table(rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: str = "") -> list[str]:
    """Rows of cells as aligned lines; `right` names the columns that align to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not a number is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
