"""Which library is loaded: a core of another version is refused in one line, whatever it has and lacks."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from snello.errors import SnelloError
from snello.native import library


def test_a_core_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, built = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text("int snello_abi_version(void) { return 1; }\n")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    monkeypatch.setattr(library, "NAMES", (str(built),))
    with pytest.raises(SnelloError, match=f"old.so has ABI 1, expected {library.ABI_VERSION}") as found:
        library.library.__wrapped__()
    assert found.value.hint == "install the package again"
