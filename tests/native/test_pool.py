"""Threads: the same bytes for any number of them, quiet when idle, and harmless to the caller's floating point."""

from __future__ import annotations

import ctypes as C
import os
import platform
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.native.harness import (
    ADD,
    FORMATS,
    LIB,
    LINEAR,
    NORM,
    Batch,
    Builder,
    CoreError,
    Pool,
    Program,
    packed,
    run_rows,
)

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def chain(width: int, depth: int, threads: int, rows: int = 64) -> Program:
    """Norms and products that take turns: many barriers."""
    rng = np.random.default_rng(0)
    b = Builder()
    x = b.table(rng.standard_normal((rows, width)).astype(np.float32))
    for _ in range(depth):
        normed = b.op(NORM, [x], b.register(width), [], [0, 0], [1e-6])
        weight = packed("f32", (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32))
        y = b.op(LINEAR, [normed], b.register(width), [b.tensor(weight)])
        x = b.op(ADD, [x, y], b.register(width), f=[0.5])
    b.gather(x)
    return b.build(threads=threads)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_any_number_of_threads_gives_the_same_bytes(rows: int) -> None:
    want = run_rows(chain(96, 12, 1), rows).tobytes()
    for threads in (2, 3, 4, 16):
        program = chain(96, 12, threads)
        for _ in range(20):
            assert run_rows(program, rows).tobytes() == want


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool and nothing else, compiled with the sanitizer that sees races."""
    program = tmp_path_factory.mktemp("pool") / "stress"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-g", "-O2", "-pthread", "-fsanitize=thread"]
    empty = program.with_suffix(".cpp")
    empty.write_text("int main() {}\n")
    if subprocess.run([*compiler, str(empty), "-o", str(program)], capture_output=True, check=False).returncode != 0:
        pytest.skip("this compiler has no thread sanitizer")
    sources = [HERE / "pool_stress.cpp", CSRC / "pool.cpp", CSRC / "error.cpp"]
    subprocess.run([*compiler, f"-I{CSRC}", *map(str, sources), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
def test_every_item_is_done_once_and_nobody_races(stress: Path, threads: int) -> None:
    done = subprocess.run([stress, str(threads), "400"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_idle_workers_sleep() -> None:
    program = chain(64, 2, 4)
    run_rows(program, 64)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_pools_come_and_go() -> None:
    for i in range(200):
        del_me = Pool(1 + i % 5)
        assert del_me.handle


@pytest.mark.parametrize("threads", [0, -3, 5000])
def test_bad_numbers_of_threads(threads: int) -> None:
    with pytest.raises(CoreError, match="num_threads"):
        Pool(threads)


def test_two_programs_share_a_pool_from_two_threads() -> None:
    programs = [chain(64, 6, 2), chain(96, 6, 2)]
    wants = [run_rows(p, 64).tobytes() for p in programs]
    wrong: list[int] = []

    def loop(i: int) -> None:
        for _ in range(50):
            if run_rows(programs[i], 64).tobytes() != wants[i]:
                wrong.append(i)

    runners = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


def test_flush_to_zero_in_the_caller_changes_nothing() -> None:
    """A caller (torch, for one) may have denormals flushed: the step does not, and leaves the caller's choice alone."""
    tiny = np.full((4, 64), 1e-40, np.float32)
    b = Builder()
    b.gather(b.op(ADD, [b.table(tiny), b.table(tiny)], b.register(64), f=[1.0]))
    program = b.build(threads=2)
    want = tiny + tiny
    assert want[0, 0] != 0
    # Where fenv_t has MXCSR or FPCR, and the bits: flush to zero and denormals are zero, or one that says both.
    place, flush = (28, 0x8040) if platform.machine() == "x86_64" else (0, 1 << 24)
    libm = C.CDLL("libm.so.6")
    environment = (C.c_uint8 * 64)()
    libm.fegetenv(environment)
    try:
        flushing = (C.c_uint8 * 64)(*environment)
        control = C.c_uint32.from_buffer(flushing, place)
        control.value |= flush
        libm.fesetenv(flushing)
        batch = Batch([(range(4), 0, 4, [])])
        assert LIB.snello_step(program.handle, C.byref(batch.c()), None) < 0  # errors restore it too
        _, got = program.step(batch)
        after = (C.c_uint8 * 64)()
        libm.fegetenv(after)
        assert C.c_uint32.from_buffer(after, place).value & flush == flush
    finally:
        libm.fesetenv(environment)
    assert got.tobytes() == want.tobytes()


def test_probes_measure_something() -> None:
    pools = [Pool(1), Pool(2)]
    for pool in pools:
        for size in (1 << 16, 1 << 22, 1 << 25):
            assert 0.5 < LIB.snello_probe_bandwidth(pool.handle, size, 3) < 5000
        rates = {f: LIB.snello_probe_compute(pool.handle, code, 3) for f, code in FORMATS.items()}
        assert all(0.5 < rate < 1e5 for rate in rates.values()), rates
    assert LIB.snello_probe_compute(pools[0].handle, 9, 1) < 0
    assert LIB.snello_probe_bandwidth(pools[0].handle, 0, 1) < 0


def test_profile_attributes_time_to_operations() -> None:
    program = chain(256, 3, 2)
    run_rows(program, 64)
    assert program.profile(True).sum() == 0
    run_rows(program, 64)
    seconds = program.profile(True)
    assert (seconds >= 0).all() and seconds.sum() > 0
    linears = [i for i in range(program.num_ops) if program.keep[0].ops[i].kind == LINEAR]
    assert seconds[linears].sum() > 0.3 * seconds.sum()
    run_rows(program, 64)
    program.profile(False)
    run_rows(program, 64)
    assert program.profile(False).sum() == 0
    assert all(a < b for a, b in pairwise(linears))
