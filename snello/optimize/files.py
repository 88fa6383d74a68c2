"""Files that are either the old or the new, whenever the power goes: written beside, flushed, renamed.

Everything that `optimize` leaves passes through here: journal units, receipts and, at the end, the output
folder, which is swapped in by one system call where the kernel has it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from snello.errors import SnelloError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content` in one step; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # a full disk is not told by name
        partial.unlink(missing_ok=True)
        if error.errno:
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(staged: Path, final: Path) -> None:
    """Puts the complete folder `staged` at `final`; an older one there is exchanged for it, then removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        os.rename(staged, final)
    elif _exchange(staged, final):
        shutil.rmtree(staged)
    else:
        old = final.with_name(f"{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(staged, final)
        shutil.rmtree(old)
    flush_folder(final.parent)


def check_exchangeable(output: Path, held: Iterable[Path]) -> None:
    """Refuses a place that could never be written or exchanged, or whose exchange would take one of `held`, the home or
    the working folder with it.
    """
    place = output.resolve()
    if not output.name or output.name == "..":
        raise SnelloError(f"--output {output} is not a folder of its own", "for example -o lean/model")
    if output.exists() and not output.is_dir():
        raise SnelloError(f"{output} is a file", "give a folder: -o lean/model")
    if output.is_mount():
        raise SnelloError(
            f"{output} is a mount point, which cannot be exchanged", f"give a folder in it: -o {output}/lean"
        )
    for path in (Path.cwd(), Path.home(), *held):
        if path.exists() and path.resolve().is_relative_to(place):
            raise SnelloError(f"--output {output} would replace {path}", "give a folder of its own: -o lean/model")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SnelloError(f"{parent} cannot be written", "give another --output")


def recover_folder(final: Path) -> None:
    """Brings the old folder back where a run was killed between the two renames of `publish_folder`."""
    old = final.with_name(f"{final.name}.old")
    if old.is_dir() and not final.exists():
        os.rename(old, final)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
