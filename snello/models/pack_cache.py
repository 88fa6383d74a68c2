"""Packed copies of checkpoints, made on first use and kept within a bound.

The core reads its own layout, so a plain checkpoint is repacked once, in its own number type, tensor by tensor,
into `$SNELLO_CACHE` (else ~/.cache/snello/packed). A copy is found again by everything that it depends on; the
least recently used ones go when the bound is reached; a lock keeps two processes from packing the same model twice.

Environment: SNELLO_CACHE, the folder; SNELLO_CACHE_BYTES, the bound (else 20 GB, or a tenth of the disk if that is
less).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snello.errors import SnelloError
from snello.models.checkpoint import CheckpointWeights
from snello.models.model import FLOAT_DTYPES, Model
from snello.models.packed import FORMAT_VERSION, PackedWeights, matrix_format, packed_bytes
from snello.models.packed_writer import PackedWriter, cannot_write
from snello.models.parameters import matrix_names
from snello.models.quantized import BESIDE as QUANTIZED_BESIDE
from snello.models.spec import Spec

DEFAULT_BYTES = 20_000_000_000
ENDING = ".safetensors"


def packed(model: Model) -> PackedWeights:
    """The model's weights in the core's layout: its own if it is packed, else the cached copy, made if need be."""
    if isinstance(model.weights, PackedWeights):
        return model.weights
    return cached(_key(model), model.spec, lambda writer: pack(model, writer))


def cached(key: str, spec: Spec, fill: Callable[[PackedWriter], None]) -> PackedWeights:
    """The packed file of this key; `fill` makes it where it is missing or damaged."""
    folder = cache_folder()
    path = folder / f"{key}{ENDING}"
    found = _open(path, spec)
    if found is not None:
        return found
    with _lock(folder, key):
        found = _open(path, spec)  # another process may have been quicker
        if found is not None:
            return found
        _make_room(folder, packed_bytes(spec), keep=path)
        with PackedWriter(path, spec) as writer:
            fill(writer)
    return PackedWeights(path, spec)


def cache_folder() -> Path:
    """Where packed copies are kept."""
    chosen = os.environ.get("SNELLO_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen).expanduser() if chosen else Path(base) / "snello" / "packed"


def pack(model: Model, writer: PackedWriter) -> None:
    """Every tensor in its own type, one at a time."""
    matrices, weights = set(matrix_names(model.spec)), model.weights
    for name in weights.names():
        if name not in matrices:
            writer.add_vector(name, weights.values(name))
            continue
        stored = weights.stored(name) if isinstance(weights, CheckpointWeights) else weights.values(name)
        format = matrix_format(model.spec, name).weights
        assert format in FLOAT_DTYPES, f"{name} is {format} and not packed"
        writer.add_float(name, stored, format)


def _key(model: Model) -> str:
    """Files (path, size, time of change), config, spec and layout: whatever changes, the copy is made anew."""
    facts: list[object] = [FORMAT_VERSION, model.spec.digest]
    for path in model.files:
        # in the Hub's cache this is the blob, whose name is the hash of its bytes
        resolved = path.resolve()
        status = resolved.stat()
        facts.append([str(resolved), status.st_size, status.st_mtime_ns])
    if not model.files:
        facts.append(model.digest)
    for config in (model.path / "config.json", model.path / QUANTIZED_BESIDE):
        facts += [hashlib.sha256(config.read_bytes()).hexdigest()] if config.exists() else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def _open(path: Path, spec: Spec) -> PackedWeights | None:
    """The packed file if it is there and whole; marks it as used."""
    if not path.exists():
        return None
    try:
        weights = PackedWeights(path, spec)
    except SnelloError:
        return None  # left by a crash of the machine, or by another version: it is replaced
    with suppress(OSError):  # a cache that others own can still be read
        os.utime(path)
    return weights


@contextmanager
def _lock(folder: Path, key: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{key}.lock").open("wb")
    except OSError as error:
        raise cannot_write(folder / "packed copy", error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the bound ------------------------------------------------------------------------------------------------------


def limit_bytes(folder: Path) -> int:
    """How large the cache may grow."""
    stated = os.environ.get("SNELLO_CACHE_BYTES")
    if stated is None:
        return min(DEFAULT_BYTES, shutil.disk_usage(folder).total // 10)
    if not stated.isdecimal():
        raise SnelloError(f"SNELLO_CACHE_BYTES is {stated!r}", "give a whole number of bytes, for example 20000000000")
    return int(stated)


def _make_room(folder: Path, needed: int, keep: Path) -> None:
    """Removes the least recently used copies until this one fits the bound and, if that helps, the disk."""
    limit = limit_bytes(folder)
    if needed > limit:
        raise SnelloError(
            f"a packed copy needs {needed / 1e9:.2f} GB, the cache {folder} is bounded at {limit / 1e9:.2f} GB",
            f"set SNELLO_CACHE_BYTES={needed * 2}, or quantize the model: a lean folder needs no copy",
        )
    _remove_abandoned(folder)
    copies = sorted(folder.glob(f"*{ENDING}"), key=_last_used)
    used = sum(_size(path) for path in copies)
    for path in copies:
        if used + needed <= limit and shutil.disk_usage(folder).free >= needed + (needed >> 4):
            return
        if path != keep:
            used -= _size(path)
            path.unlink(missing_ok=True)  # a process that has it mapped keeps its pages


def _remove_abandoned(folder: Path) -> None:
    """Half-written files whose writer is gone: nobody holds their lock."""
    for path in folder.glob(f"*{ENDING}.partial"):
        lock = path.with_name(path.name.removesuffix(f"{ENDING}.partial") + ".lock")
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            path.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
