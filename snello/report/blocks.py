"""What a report is made of, before anything is drawn: sections of blocks of finished text.

Every number is written once, here, as text; HTML, Markdown and JSON render the same blocks, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """Lines that can be pasted into a shell."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """`right`: columns of numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing (an `svg` element) and the data that it shows. Pages without drawings show the table."""

    title: str
    svg: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A passage where the lean model lost most: underline thicknesses 0..5 of each token per model, and where the lean
    one was clearly worse. `peaks`: the tokens that lost most, in words.
    """

    caption: str
    peaks: str
    tokens: tuple[str, ...]
    original: tuple[int, ...]
    lean: tuple[int, ...]
    lost: tuple[bool, ...]


Block: TypeAlias = Text | Items | Command | Table | Chart | Excerpt


@dataclass(frozen=True, kw_only=True)
class Section:
    """`about`: what this is, how to read it, when it misleads."""

    key: str
    title: str
    about: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    sections: tuple[Section, ...]
