"""Products on tiles: the same bits at every number of rows and panels, and trusted only where they were tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snello.native import core
from tests.native.harness import ISAS, isa
from tests.native.test_linear import Case, packed, product, random_matrix

COLUMNS = 2112  # two whole steps of columns and a rest
COUNTS = [*range(1, 68), 96, 511, 512, 513, 700]


@pytest.mark.parametrize("format_,group_size", [("int8", 0), ("int4", 32), ("int4", 128)])
def test_every_number_of_rows(format_: str, group_size: int) -> None:
    """Against the first instruction set, which the oracle has checked: 19 panels are two groups and an odd rest."""
    rng = np.random.default_rng(group_size)
    weights = packed(random_matrix(format_, group_size, 300, COLUMNS, rng))
    x = rng.standard_normal((max(COUNTS), COLUMNS)).astype(np.float32)
    onto = rng.standard_normal((max(COUNTS), 300)).astype(np.float32)
    case = Case(weights, x, rng.standard_normal(300).astype(np.float32), onto, x)
    for count in COUNTS:
        with isa(ISAS[0]):
            wanted = product(case, count, True, threads=2)
        with isa("amx-emulated"):
            assert product(case, count, True, threads=2).tobytes() == wanted.tobytes(), count


def test_emulated_tiles_are_never_a_machines_own_choice() -> None:
    assert "amx-emulated" not in core.available_isas()
    assert core.select_isa(None) != "amx-emulated" or os.environ.get("SNELLO_ISA") == "amx-emulated"


def test_amx_is_offered_only_where_it_was_tried() -> None:
    status = core.amx_status()
    listed = "amx" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    assert status in ("absent", "refused", "failed", "trusted")
    assert ("amx" in core.available_isas()) == (status == "trusted")
    assert listed or status == "absent"


def test_no_child_is_left_by_the_trial() -> None:
    code = (
        "import os; from snello.native.library import library; library().snello_amx();\n"
        "try: os.waitpid(-1, os.WNOHANG); print('a child')\n"
        "except ChildProcessError: print('none')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "none\n"
