"""What is done is never done again: finished units of work, kept by the hash of what they were computed from.

A run that was killed finds its units here and goes on after the last one. A unit's name is the SHA-256 of its inputs
(model digests, options, text hash, seed, version), so a unit can never be taken for another. Numbers are one JSON file,
arrays an .npz beside it that is written first; both appear by a rename, whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from snello.errors import SnelloError
from snello.optimize.events import plain
from snello.optimize.files import write_atomically


def unit_key(name: str, inputs: Mapping[str, Any]) -> str:
    """The name of a unit: what it is and everything that it depends on."""
    text = json.dumps({"unit": name, **plain(dict(inputs))}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Unit:
    """A finished unit. `seconds`: what it took, when it was really done."""

    name: str
    value: Any
    seconds: float
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Journal:
    """The units of one work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "units"
        self.artifacts = folder / "artifacts"
        self._made_parent = not folder.parent.exists()
        self.units.mkdir(parents=True, exist_ok=True)
        self.artifacts.mkdir(exist_ok=True)
        self._lock = self._locked()
        self._sweep()

    def _locked(self) -> IO[bytes]:
        """Two runs in one folder would take each other's files for their own."""
        file = open(self.folder / "lock", "wb")  # noqa: SIM115 - held as long as the journal
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            message = f"another run is at work in {self.folder}"
            raise SnelloError(message, "wait for it, or give another --output") from None
        return file

    def _sweep(self) -> None:
        """What a killed run left half written. A `.state` beside an artefact is whole: a step goes on from it."""
        for partial in self.artifacts.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for partial in self.units.glob("*.partial"):
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets others in. A folder that holds nothing finished goes."""
        if self.folder.is_dir() and self.is_new:
            self.clear()
        self._lock.close()

    def clear(self) -> None:
        """Nothing of this run is worth going on from."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_parent:
            with suppress(OSError):  # something else is in it
                self.folder.parent.rmdir()

    @property
    def is_new(self) -> bool:
        return not any(self.units.glob("*.json"))

    def recall(self, key: str) -> Unit | None:
        """A finished unit; one that cannot be read is as good as not done."""
        try:
            entry = json.loads((self.units / f"{key}.json").read_text(encoding="utf-8"))
            arrays = {}
            if entry["arrays"]:
                stored = io.BytesIO((self.units / f"{key}.npz").read_bytes())  # numpy leaves a broken file open
                with np.load(stored, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
            return Unit(entry["name"], entry["value"], entry["seconds"], arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, key: str, unit: Unit) -> None:
        if unit.arrays:
            buffer = io.BytesIO()
            np.savez(buffer, **dict(unit.arrays))  # type: ignore[arg-type]
            write_atomically(self.units / f"{key}.npz", buffer.getvalue())
        entry = {
            "name": unit.name,
            "seconds": unit.seconds,
            "arrays": bool(unit.arrays),
            "value": plain(unit.value),
        }
        write_atomically(self.units / f"{key}.json", json.dumps(entry, indent=1))
