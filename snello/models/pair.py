"""The folder of an original and the lean model that drafts for it: two models, one answer.

    deployment.json   names both and says that the answers are the original's
    original/         the checkpoint, its files linked rather than copied where the file system allows it
    draft/            the lean model

A link is as good as a copy here: the original's bytes stay when its first place is cleared, and are not held twice. The
same is not true of a path, which breaks when the first place moves; so paths are never written down.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from snello.errors import SnelloError
from snello.models.files import read_json
from snello.models.model import Model

PAIR, ORIGINAL, DRAFT = "deployment.json", "original", "draft"
VERSION = 1
SMALL = (".json", ".txt", ".jinja", ".model")  # besides the weights, what describes a checkpoint
KEYS = {"version", "model", "draft", "answers"}
ANSWERS = "the original's, token for token: the draft guesses and the original verifies"


def write_pair(folder: Path, original: Model, draft: Path) -> None:
    """Puts both beside each other at `folder`, which must not be there; it appears whole."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        (beside / ORIGINAL).mkdir(parents=True)
        for source in _files(original):
            link_file(source, beside / ORIGINAL / source.name)
        link_folder(draft, beside / DRAFT)
        named = ORIGINAL if original.path.is_dir() else f"{ORIGINAL}/{original.path.name}"
        table = {"version": VERSION, "model": named, "draft": DRAFT, "answers": ANSWERS}
        (beside / PAIR).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_pair(folder: Path) -> tuple[Path, Path]:
    """(the original, the draft) of a folder that holds both.

    Raises:
        SnelloError: deployment.json says something that is not understood, or one of them is not there.
    """
    table = read_json(folder / PAIR)
    if table.keys() != KEYS or table["version"] != VERSION:
        raise SnelloError(f"{folder / PAIR} is not understood", "was the folder made by another version of snello?")
    found = []
    for key in ("model", "draft"):
        path = folder / str(table[key])
        if folder.resolve() not in path.resolve().parents:
            raise SnelloError(f"{folder / PAIR}: {key} lies outside, or is the folder itself", "make the folder again")
        if not path.exists():
            raise SnelloError(f"{path} is missing", "copy the folder whole, or make it again")
        found.append(path)
    return found[0], found[1]


def _files(model: Model) -> list[Path]:
    """Its weights and the small files beside them."""
    if not model.path.is_dir():
        return [model.path]
    small = [path for path in sorted(model.path.iterdir()) if path.suffix in SMALL and path.is_file()]
    return [*model.files, *(path for path in small if path not in model.files)]


def link_folder(source: Path, target: Path) -> None:
    """All files of a folder, in their places; folders in it are made."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            link_file(path, place)


def link_file(source: Path, place: Path) -> None:
    """Without copying bytes where the file system allows it."""
    try:
        os.link(source.resolve(), place)  # of what a symbolic link names, such as a blob of a download cache
    except OSError:
        shutil.copyfile(source, place)
