"""The lean folder: snello.json beside a packed file, with the tokenizer and configs of the original.

It is what every technique leaves behind and what `load` opens without torch. Folders are written beside their place
and renamed, so that a lean folder is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snello.errors import SnelloError
from snello.models.files import read_json
from snello.models.generation import check_generation
from snello.models.model import Model
from snello.models.packed import FORMAT_VERSION, PackedWeights
from snello.models.packed_writer import PackedWriter, cannot_write
from snello.models.spec import Spec
from snello.models.spec_json import spec_from_json
from snello.models.tokenizer import NAMED_TEMPLATES, TOKENIZER_FILES, copy_tokenizer_files

LEAN = "snello.json"
PACKED = "model.safetensors"
KEYS = {"format_version", "spec", "history", "source", "generation"}
CONFIGS = ("config.json", "generation_config.json")


def load_lean(folder: Path, name: str) -> Model:
    """Opens a lean folder; refuses unknown keys and other major versions."""
    table = read_json(folder / LEAN)
    version = table.get("format_version")
    if not isinstance(version, str) or version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        hint = "make it again from the original, or install the version of snello that made it"
        raise SnelloError(f"{folder / LEAN} has format version {version}, this snello reads {FORMAT_VERSION}", hint)
    odd = sorted(KEYS ^ table.keys())
    if odd:
        kinds = ", ".join(f"{'unknown' if key in table else 'missing'} key {key!r}" for key in odd)
        raise SnelloError(f"{folder / LEAN}: {kinds}", "was the folder made by another version of snello?")
    _check_told(table, folder / LEAN)
    spec = spec_from_json(table["spec"])
    path = folder / PACKED
    return Model(
        spec=spec,
        weights=PackedWeights(path, spec),
        path=folder,
        name=name,
        generation=table["generation"],
        history=tuple(table["history"]),
        files=(path,),
    )


def _check_told(table: Mapping[str, Any], path: Path) -> None:
    """What is carried from folder to folder beside the spec."""
    steps = table["history"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise SnelloError(f"{path}: history is no list of steps", "copy the folder again, or make it again")
    if not isinstance(table["generation"], dict):
        raise SnelloError(f"{path}: generation is no table of settings", "copy the folder again, or make it again")
    check_generation(table["generation"], f"{path}: generation")


def write_lean_folder(
    path: Path,
    spec: Spec,
    source: Model,
    history: Sequence[Mapping[str, Any]],
    fill: Callable[[PackedWriter], None],
) -> None:
    """Writes a lean folder at `path`; `fill` adds every tensor. A lean folder that is there is replaced.

    Raises:
        SnelloError: something else is in the way, or the disk is full; nothing is left half-written.
    """
    _check_free(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with PackedWriter(beside / PACKED, spec) as writer:
            fill(writer)
        _copy_small_files(source, beside)
        table = {
            "format_version": FORMAT_VERSION,
            "spec": spec.to_json(),
            "history": list(history),
            "source": {"name": source.name, "spec": source.spec.digest},
            "generation": dict(source.generation),
        }
        (beside / LEAN).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        move_into_place(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_free(path: Path) -> None:
    """Only an absent or empty folder, or a lean one with nothing else in it, may be replaced."""
    if path.exists() and not path.is_dir():
        raise SnelloError(f"{path} is a file", "choose another output folder")
    own = {LEAN, PACKED, *TOKENIZER_FILES, NAMED_TEMPLATES, *CONFIGS}
    others = {item.name for item in path.iterdir()} - own if path.exists() else set()
    if others or (path.exists() and any(path.iterdir()) and not (path / LEAN).exists()):
        held = ", ".join(sorted(others)[:4]) or "a model"
        raise SnelloError(f"{path} is not empty and holds {held}", "choose another output folder")


def _copy_small_files(source: Model, folder: Path) -> None:
    """The tokenizer as the source has it; a source without files of its own writes it anew."""
    if source.path.is_dir():
        copy_tokenizer_files(source.path, folder)
        for name in CONFIGS:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder / name)
    elif source.path.suffix == ".bin":
        source.tokenizer.save(folder)


def move_into_place(beside: Path, path: Path) -> None:
    """Renames a finished folder to its place; an older one there goes only once that has worked."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    replaced = path.exists()
    if replaced:
        path.rename(old)
    try:
        beside.rename(path)
    except OSError:
        if replaced:
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
