"""The standard-library modules that the embedded model `demo` has never seen.

The model is trained on the Python standard library, so the only honest measure of it is text that was
kept out by name.  The list is literal because two places must agree on it for ever: the training script,
which leaves these modules and their tests out, and every evaluation, which reads them from the user's own
Python.  All of them exist as plain files in CPython 3.11, 3.12 and 3.13.
"""

from __future__ import annotations

import sysconfig
import tokenize
from pathlib import Path

HELD_OUT: tuple[str, ...] = (
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "configparser.py",
    "csv.py",
    "filecmp.py",
    "fnmatch.py",
    "fractions.py",
    "gettext.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "json/encoder.py",
    "netrc.py",
    "plistlib.py",
    "pprint.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
    "trace.py",
    "zipapp.py",
)


def stdlib_directory() -> Path:
    """The directory that holds the pure-Python standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def read_source(path: Path) -> str:
    """A Python file as text: its own declared encoding, no byte-order mark, newlines as `\\n`."""
    with tokenize.open(path) as stream:
        return stream.read()


def names_of_tests() -> frozenset[str]:
    """Names of the test files and test packages of the held-out modules, without `.py`."""
    return frozenset("test_" + name.removesuffix(".py").split("/")[0] for name in HELD_OUT)


def is_held_out(relative: str) -> bool:
    """Whether a path inside the standard library (with `/`) is a held-out module or one of its tests."""
    parts = relative.removesuffix(".py").split("/")
    return relative in HELD_OUT or not names_of_tests().isdisjoint(parts)


def read_held_out() -> list[tuple[str, str]]:
    """`(name, text)` of every held-out module, read from the running Python, in the order of the list."""
    root = stdlib_directory()
    missing = [name for name in HELD_OUT if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(f"this Python has no source for {', '.join(missing)} under {root}")
    return [(name, read_source(root / name)) for name in HELD_OUT]
