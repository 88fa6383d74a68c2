"""Instruction sets: selected by name or environment, refused loudly, and kept out of everybody else's code."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snello.errors import SnelloError
from snello.native import core, library

SETS = core.available_isas()
LIBRARY = next(p for name in library.NAMES if (p := Path(library.__file__).parent / name).exists())


def test_every_available_set_can_be_selected() -> None:
    assert SETS[-1] == "scalar"
    for name in SETS:
        assert core.select_isa(name) == name
    assert core.select_isa(SETS[0]) == SETS[0]


def test_an_unknown_set_is_refused_and_changes_nothing() -> None:
    core.select_isa("scalar")
    with pytest.raises(SnelloError, match="unknown instruction set 'mmx'"):
        core.select_isa("mmx")
    assert core.select_isa(SETS[0]) == SETS[0]


def select_in_a_new_process(value: str) -> subprocess.CompletedProcess[str]:
    code = "from snello.native import core; print(core.select_isa(None))"
    environment = os.environ | {"SNELLO_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_selects_and_fails_loudly() -> None:
    assert select_in_a_new_process("scalar").stdout.strip() == "scalar"
    assert select_in_a_new_process("").stdout.strip() == SETS[0]
    failed = select_in_a_new_process("mmx")
    assert failed.returncode != 0 and "unknown instruction set 'mmx'" in failed.stderr


def functions_with(*patterns: str) -> dict[str, set[str]]:
    """Pattern -> the functions of the library in whose code it occurs."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True).stdout
    places: dict[str, set[str]] = {pattern: set() for pattern in patterns}
    function, named = "", False
    for line in listing.splitlines():
        if heading := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
            named = named or function.startswith(("_ZN6snello", "_ZNK6snello"))
        for pattern, found in places.items():
            if pattern in line:
                found.add(function)
    if not named:
        pytest.skip("the library is stripped: its inner functions have no names left")
    assert all(places.values())  # else nothing was looked at
    return places


def only_in(functions: set[str], *sets: str) -> bool:
    return all(any(name in function for name in sets) for function in functions)


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump on x86-64")
def test_wide_registers_stay_in_their_own_sets() -> None:
    """The linker must not have kept a shared inline function that was compiled for a newer processor."""
    places = functions_with("%zmm", "%ymm")
    wide = ("avx512vnni", "3amx", "avxvnni_evex", "tiles_hold")
    assert only_in(places["%zmm"], *wide)
    assert only_in(places["%ymm"], *wide, "avx2", "avxvnni")


@pytest.mark.skipif(platform.machine() != "aarch64" or not shutil.which("objdump"), reason="needs objdump on aarch64")
def test_products_of_bytes_stay_in_their_own_sets() -> None:
    places = functions_with("\tsdot", "\tusdot", "\tsmmla")
    assert only_in(places["\tusdot"] | places["\tsmmla"], "neon_i8mm")
    assert only_in(places["\tsdot"], "neon_i8mm", "neon_dotprod")
