"""Examples for an adapter, and which of them are held out: whole families, so that no near copy judges its twin.

A family is what shares six words in a row (a document is one of plain text): sets of labelled phrases hold many pieces
of one sentence. Phrases that are too short for that and stand inside a held-out text are dropped from training.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snello.errors import SnelloError
from snello.measure.documents import read_labelled, read_source

SHARED_WORDS = 6
COMMON = (10, 0.2)  # words that so many examples, and this share of them, have in common are a form, not a kinship
HELD_OUT_SHARE, HELD_OUT_MOST, LEAST_FAMILIES = 0.2, 512, 8
QUESTION = "{}\nlabel:"
FORMATS = 'JSONL with {"prompt", "completion"} or {"text", "label"}, a TSV of text and label, or plain text'


@dataclass(frozen=True, kw_only=True)
class Example:
    """`label` is set where the answer is one of few; `family` where it is known from the start."""

    prompt: str
    completion: str
    label: str | None = None
    family: str | None = None

    @property
    def text(self) -> str:
        """Of a labelled example: the text alone, without the question that a decoder is asked."""
        return self.prompt.removesuffix(QUESTION.format(""))


@dataclass(frozen=True, kw_only=True)
class Split:
    """`families` numbers those of `held_out`, one for each example."""

    train: list[Example]
    held_out: list[Example]
    families: list[int]
    dropped: int


def read_examples(path: Path) -> list[Example]:
    """All examples of a file; its name says which kind it is.

    Raises:
        SnelloError: it is not there, is no such file, or is empty.
    """
    if path.suffix == ".jsonl":
        examples = [_from_row(path, number, line) for number, line in _lines(path)]
    elif path.suffix == ".tsv":
        rows = read_labelled(path)
        if any(row.other is not None for row in rows):
            raise SnelloError(f"{path} holds pairs of texts", FORMATS)
        examples = [labelled(row.text, str(row.label)) for row in rows]
    else:
        documents = read_source(path)
        examples = [Example(prompt="", completion=d.text, family=d.name) for d in documents if d.text.strip()]
    if not examples:
        raise SnelloError(f"{path} holds no example", FORMATS)
    if len({example.label is None for example in examples}) > 1:
        raise SnelloError(f"{path} mixes completions and labels", "one kind in a file")
    return examples


def labelled(text: str, label: str) -> Example:
    return Example(prompt=QUESTION.format(text.strip()), completion=f" {label}", label=label)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SnelloError(f"{path} cannot be read: {error}", FORMATS) from None
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _from_row(path: Path, number: int, line: str) -> Example:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        if row["completion"].strip():
            return Example(prompt=row["prompt"], completion=row["completion"])
    elif isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("label"), (str, int)):
        return labelled(row["text"], str(row["label"]))
    raise SnelloError(f"{path}, line {number}: neither a prompt with its completion nor a text with its label", FORMATS)


def split(examples: Sequence[Example], seed: int) -> Split:
    """Whole families held out, about a fifth of the examples, in an order that the seed draws.

    Raises:
        SnelloError: there are too few families to judge anything.
    """
    groups = _families(examples)
    want = min(HELD_OUT_MOST, HELD_OUT_SHARE * len(examples))
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed} {_text(examples[group[0]])}".encode()).digest())
    held: list[list[int]] = []
    for group in order:
        taken = sum(map(len, held))
        wanted = taken < want or len(held) < LEAST_FAMILIES
        if wanted and taken + len(group) <= max(2 * want, LEAST_FAMILIES):
            held.append(group)
    places = {place for group in held for place in group}
    rest = [example for place, example in enumerate(examples) if place not in places]
    inside = _pieces(_text(examples[place]) for place in places)
    train = [example for example in rest if tuple(_text(example).split()) not in inside]
    if len(held) < LEAST_FAMILIES or not train:
        message = f"{len(examples)} examples in {len(groups)} families are too few: {len(held)} can be held out"
        raise SnelloError(message, f"a verdict needs {LEAST_FAMILIES} unrelated ones, so about 50 examples in all")
    return Split(
        train=train,
        held_out=[examples[place] for group in held for place in group],
        families=[number for number, group in enumerate(held) for _ in group],
        dropped=len(rest) - len(train),
    )


def _text(example: Example) -> str:
    return " ".join((example.prompt or example.completion).lower().split())


def _families(examples: Sequence[Example]) -> list[list[int]]:
    """Places of the examples, family by family: those that share a run of words, and all that are linked so."""
    keys = [_keys(example) for example in examples]
    counts = Counter(key for each in keys for key in each)
    most = max(COMMON[0], COMMON[1] * len(examples))
    parent = list(range(len(examples)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[object, int] = {}
    for place, each in enumerate(keys):
        for key in each:
            if counts[key] <= most:
                parent[root(place)] = root(first.setdefault(key, place))
    groups: dict[int, list[int]] = {}
    for place in range(len(examples)):
        groups.setdefault(root(place), []).append(place)
    return list(groups.values())


def _keys(example: Example) -> set[object]:
    if example.family is not None:
        return {example.family}
    words = _text(example).split()
    runs = range(max(1, len(words) - SHARED_WORDS + 1))
    return {tuple(words[start : start + SHARED_WORDS]) for start in runs}


def _pieces(texts: Iterator[str]) -> set[tuple[str, ...]]:
    """All runs of words shorter than those that make a family; a single word says nothing."""
    found: set[tuple[str, ...]] = set()
    for words in map(str.split, texts):
        for size in range(2, SHARED_WORDS):
            found.update(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
    return found
