"""Products on tiles: the same bits at every number of rows and panels, and trusted only where they were tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snello.native import core
from tests.native.harness import (
    ACTIVATE,
    ADD,
    BF16_ROWS,
    INT8_ROWS,
    ISAS,
    LINEAR,
    TRANSFORM,
    Builder,
    Program,
    Tensor,
    isa,
    run_rows,
)
from tests.native.test_linear import Case, packed, packed_float, product, random_matrix
from tests.oracle import F32

COUNTS = [*range(1, 68), 96, 511, 512, 513, 700]
LONG = 128 * 64 + 192  # columns: more than a panel keeps unpacked, so sums are parked between
TILED = ["amx-emulated", *(name for name in ISAS if name == "amx")]
OTHER = next(name for name in ISAS if name != "amx")


def compare(case: Case, counts: list[int], rows: int = INT8_ROWS) -> None:
    """Every way over tiles against an instruction set without, which the oracle has checked."""
    for count in counts:
        with isa(OTHER):
            wanted = product(case, count, rows, threads=2)
        for name in TILED:
            with isa(name):
                assert product(case, count, rows, threads=2).tobytes() == wanted.tobytes(), (name, count)


@pytest.mark.parametrize(
    ("format_", "group_size"), [("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128), ("int3", 64)]
)
def test_every_number_of_rows(format_: str, group_size: int) -> None:
    """19 panels are two groups and an odd rest, whose last panel is not whole."""
    rng = np.random.default_rng(group_size)
    weights = packed(random_matrix(format_, group_size, 300, 2112, rng))
    x = rng.standard_normal((max(COUNTS), 2112)).astype(np.float32)
    onto = rng.standard_normal((max(COUNTS), 300)).astype(np.float32)
    compare(Case(weights, x, rng.standard_normal(300).astype(np.float32), onto, x), COUNTS)


@pytest.mark.parametrize(("n", "k", "most"), [(300, 2112, 700), (96, 128, 513), (48, 128 * 32 + 96, 150)])
def test_bf16_rows(n: int, k: int, most: int) -> None:
    """With and without a bias, whole panels and not, and longer than a panel keeps: parked sums are FP32."""
    rng = np.random.default_rng(n)
    weights = packed_float("bf16", rng.standard_normal((n, k)).astype(np.float32))
    x = rng.standard_normal((most, k)).astype(np.float32) * np.float32(10) ** rng.integers(-6, 6, (most, k))
    x, counts = x.astype(np.float32), [count for count in COUNTS if count <= most]
    onto = rng.standard_normal((most, n)).astype(np.float32)
    compare(Case(weights, x, None, None, x), counts, BF16_ROWS)
    compare(Case(weights, x, rng.standard_normal(n).astype(np.float32), onto, x), counts, BF16_ROWS)


@pytest.mark.parametrize(("format_", "group_size"), [("int8", 0), ("int4", 128)])
def test_whole_panels_and_nothing_added(format_: str, group_size: int) -> None:
    rng = np.random.default_rng(1)
    weights = packed(random_matrix(format_, group_size, 96, 128, rng))
    x = rng.standard_normal((513, 128)).astype(np.float32)
    compare(Case(weights, x, None, None, x), [1, 16, 17, 32, 33, 64, 65, 512, 513])


@pytest.mark.parametrize(("format_", "group_size"), [("int8", 0), ("int4", 32), ("int3", 128)])
def test_rows_longer_than_a_panel_keeps(format_: str, group_size: int) -> None:
    rng = np.random.default_rng(2)
    weights = packed(random_matrix(format_, group_size, 48, LONG, rng))
    x = rng.standard_normal((150, LONG)).astype(np.float32)
    compare(Case(weights, x, None, None, x), [1, 32, 33, 49, 129, 150])


def gated_program(weights: tuple[Tensor, Tensor], x: F32, kind: int, read_up: bool) -> Program:
    """activation(x gate) * (x up), in place and up first, or plus the second product, which is read again."""
    b = Builder()
    n = weights[0].rows
    into = b.op(TRANSFORM, [b.table(x)], b.register(weights[0].columns, True))
    products = [b.op(LINEAR, [into], b.register(n), [b.tensor(w)]) for w in weights]
    if read_up:
        gate, up = products
        out = b.op(ACTIVATE, [gate, up], b.register(n), i=[kind])
        b.op(ADD, [out, up], out, f=[1.0])
    else:
        up, gate = products
        out = b.op(ACTIVATE, [gate, up], up, i=[kind])
    b.gather(out)
    return b.build(threads=2)


def gated(weights: tuple[Tensor, Tensor], x: F32, kind: int, read_up: bool) -> F32:
    return run_rows(gated_program(weights, x, kind, read_up), len(x))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("format_", "group_size", "n"), [("int8", 0, 300), ("int4", 128, 304), ("int3", 64, 20)])
def test_two_products_and_their_activation_at_once(format_: str, group_size: int, n: int, kind: int) -> None:
    """The second product is there for who reads it afterwards."""
    rng = np.random.default_rng(kind)
    weights = tuple(packed(random_matrix(format_, group_size, n, 192, rng)) for _ in range(2))
    x = rng.standard_normal((97, 192)).astype(np.float32)
    for count in (1, 16, 17, 33, 97):
        for read_up in (False, True):
            with isa(OTHER):
                wanted = gated(weights, x[:count], kind, read_up)
            for name in TILED:
                with isa(name):
                    assert gated(weights, x[:count], kind, read_up).tobytes() == wanted.tobytes(), (name, count)


@pytest.mark.parametrize("name", TILED)
def test_one_row_takes_tiles_and_vectors_in_turn_and_then_the_faster(name: str) -> None:
    rng = np.random.default_rng(3)
    weights = tuple(packed(random_matrix("int4", 128, 304, 192, rng)) for _ in range(2))
    x, tried = rng.standard_normal((2, 192)).astype(np.float32), 32
    with isa(OTHER):
        program = gated_program(weights, x, 1, False)
        wanted = run_rows(program, 2)
        for _ in range(tried + 1):
            assert run_rows(program, 1).tobytes() == wanted[:1].tobytes()
        assert program.one_row() == (0, 0.0, 0.0), "there is one way only"
    with isa(name):
        program = gated_program(weights, x, 1, False)
        for done in range(tried + 8):
            assert (program.one_row()[0] > 0) == (done >= tried)
            assert run_rows(program, 1).tobytes() == wanted[:1].tobytes()
            assert run_rows(program, 2).tobytes() == wanted.tobytes(), "more rows try nothing"
    way, on_tiles, on_vectors = program.one_row()
    assert (way == core.ONE_ROW_ON_TILES) == (on_tiles <= on_vectors)
    assert min(on_tiles, on_vectors) > 0


@pytest.mark.parametrize("name", ["amx-emulated", "bf16-emulated"])
def test_what_is_emulated_is_never_a_machines_own_choice(name: str) -> None:
    assert name not in core.available_isas()
    assert core.select_isa(None) != name or os.environ.get("SNELLO_ISA") == name


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
