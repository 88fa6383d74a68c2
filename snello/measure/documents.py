"""From files to documents: what counts as one piece of text that must not be torn apart.

Cutting by document keeps calibration from leaking into the proof, so the rule is fixed and simple: files are
apart; a JSONL row is a document; within a plain file, the model's end token divides, else chapter headings,
else blank lines, else lines, the pieces gathered until they hold at least 2,000 characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snello.errors import SnelloError

LEAST_CHARACTERS = 2_000
MOST_CHARACTERS = 40_000  # longer chapters are divided further, so that a few long ones cannot be all of a cut
_HEADING = re.compile(r"^\s*(chapter|book|part|act|scene|letter|#{1,3} |= )[^\n]{0,80}$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Document:
    """`tokens` are set where a model wrote the text itself, and how many of them were its prompt; `label` and `other`
    where it is labelled.
    """

    source: str
    name: str
    text: str
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    label: str | None = None
    other: str | None = None  # the second text of a pair


def read_source(path: Path, end_token: str | None = None) -> list[Document]:
    """All documents of one `--text`: a file, or a folder of .txt, .md, .jsonl and .raw files."""
    if not path.exists():
        raise SnelloError(f"there is no text at {path}", "give a file, or a folder of .txt files")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    documents = [document for file in files for document in read_file(file, path.name, end_token)]
    if not documents:
        raise SnelloError(f"{path} holds no text", "give a file, or a folder of .txt files")
    return documents


SUFFIXES = frozenset({".txt", ".md", ".raw", ".jsonl"})


def read_file(path: Path, source: str, end_token: str | None) -> list[Document]:
    text = _text(path)
    pieces = _rows(path, text) if path.suffix == ".jsonl" else split(text, end_token)
    return [Document(source=source, name=f"{path.name}#{i}", text=piece) for i, piece in enumerate(pieces)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        hint = f"convert it: iconv -f latin1 -t utf-8 {path} > {path.stem}.utf8.txt"
        raise SnelloError(f"{path} is not UTF-8 (byte {error.start})", hint) from error
    except OSError as error:
        raise SnelloError(f"{path} cannot be read: {error.strerror}", "give a text that may be read") from error


def _rows(path: Path, text: str) -> list[str]:
    """A JSONL row's "text"; any other row is the user's to mend."""
    pieces = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 in a string ends no row
        if not line.strip():
            continue
        try:
            piece = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise SnelloError(f'{path} line {number} has no "text"', 'each row is {"text": "..."}') from error
        if not isinstance(piece, str):
            raise SnelloError(f'{path} line {number}: "text" is {json.dumps(piece)[:40]}', "it must be a string")
        pieces.append(piece)
    return pieces


def split(text: str, end_token: str | None = None) -> list[str]:
    """One file's text as documents (see the module's paragraph for the rule)."""
    if end_token and end_token in text:
        return [piece for piece in text.split(end_token) if piece.strip()]
    chapters = _chapters(text.splitlines(keepends=True))
    pieces = [part for chapter in chapters for part in _blocks(chapter)] if len(chapters) > 1 else _blocks(text)
    return [piece for piece in pieces if piece.strip()]


def _chapters(lines: Sequence[str]) -> list[str]:
    """Divided before each heading that starts at least 2,000 characters of text."""
    chapters: list[list[str]] = [[]]
    size = 0
    for line in lines:
        if size >= LEAST_CHARACTERS and (_HEADING.match(line.rstrip("\n")) or line.startswith("\f")):
            chapters.append([])
            size = 0
        chapters[-1].append(line)
        size += len(line)
    return ["".join(chapter) for chapter in chapters]


def _blocks(text: str) -> list[str]:
    """A chapter that is not too long as it is; else blank-line blocks, else lines, gathered."""
    if len(text) <= MOST_CHARACTERS and _HEADING.match(text.lstrip().split("\n", 1)[0]):
        return [text]
    blocks = re.split(r"(?<=\n)\s*\n", text)
    return gather(blocks if len(blocks) > 2 else text.splitlines(keepends=True))


def gather(pieces: Iterable[str]) -> list[str]:
    """Consecutive pieces joined until they hold 2,000 characters; a short rest joins the last."""
    gathered: list[str] = []
    current = ""
    for piece in pieces:
        current += piece if piece.endswith("\n\n") or not piece.endswith("\n") else piece + "\n"
        if len(current) >= LEAST_CHARACTERS:
            gathered.append(current)
            current = ""
    if current.strip():
        gathered[-1:] = [gathered[-1] + current] if gathered else [current]
    return gathered


def read_labelled(path: Path) -> list[Document]:
    """Rows of a TSV: text and label, or text, text and label (pairs); a header line is recognized by its
    names.
    """
    if not path.is_file():
        raise SnelloError(f"there is no text at {path}", "give a TSV file: text, tab, label")
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    rows = [line.split("\t") for _, line in lines]
    if rows and rows[0][-1].strip().lower() in ("label", "score", "gold"):
        rows, lines = rows[1:], lines[1:]
    if not rows or not all(len(row) == len(rows[0]) for row in rows) or len(rows[0]) not in (2, 3):
        hint = "each row is: text, tab, label (or: text, tab, other text, tab, label)"
        raise SnelloError(f"{path} is not a table of labelled texts", hint)
    for (number, _), row in zip(lines, rows, strict=True):
        if not all(cell.strip() for cell in row):
            raise SnelloError(f"{path} line {number} has an empty field", "remove that line, or fill it")
    return [_labelled(path, number, row) for number, row in enumerate(rows)]


def _labelled(path: Path, number: int, row: list[str]) -> Document:
    return Document(
        source=path.name,
        name=f"{path.name}#{number}",
        text=row[0].strip(),
        label=row[-1].strip(),
        other=row[1].strip() if len(row) == 3 else None,
    )


def read_lines(path: Path) -> list[Document]:
    """One document a line (encoders without labels); lines under 20 characters are left out."""
    if not path.is_file():
        raise SnelloError(f"there is no text at {path}", "give a file with one text a line")
    lines = [line.strip() for line in _text(path).splitlines()]
    kept = [(i, line) for i, line in enumerate(lines) if len(line) >= 20]
    if not kept:
        raise SnelloError(f"{path} holds no text", "give a file with one text of at least 20 characters a line")
    return [Document(source=path.name, name=f"{path.name}#{i}", text=line) for i, line in kept]


def order(documents: Sequence[Document], seed: int) -> list[Document]:
    """A seeded order that depends on each document's own text alone, so that adding one moves no other."""

    def key(document: Document) -> str:
        content = (document.text, document.tokens, document.label, document.other)
        return hashlib.sha256(f"{seed} {content!r}".encode()).hexdigest()

    unique = {key(document): document for document in reversed(documents)}
    return [unique[name] for name in sorted(unique)]
