"""Memory that is not there: an error code and a line from every call that asks for some, and the next call is right.

Each runs in a process of its own, whose address space is closed (RLIMIT_AS) when everything is made.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = """
import ctypes as C
import resource
from contextlib import contextmanager
import numpy as np
from tests.native.harness import *
from snello.native.library import CCacheLayer, CSampling, last_error

@contextmanager
def no_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
"""
# Convolutions of many sequences: a step keeps the rows of state that it takes the slots of.
STEP = """
WIDTH, SEQUENCES, KERNEL, BLOCK = 4096, 700, 8, 8
layers = (CCacheLayer * 1)(CCacheLayer(1, WIDTH, 0, BLOCK))
def new_cache():
    cache = Cache.__new__(Cache)
    cache.num_pages, cache.handle = SEQUENCES, LIB.snello_cache_create(layers, 1, SEQUENCES)
    return cache
b = Builder()
table = b.table(np.random.default_rng(0).standard_normal((64, WIDTH)).astype(np.float32))
taps = b.tensor(plain(np.random.default_rng(1).standard_normal((KERNEL, WIDTH)).astype(np.float32)))
out = b.op(CONVOLVE, [table, table, table], b.register(WIDTH), [taps], i=[0, KERNEL])
b.gather(out)
program, other = (b.build(new_cache(), threads=2, max_rows=8 * SEQUENCES) for _ in range(2))
def batch(first, count):
    some = np.arange(first, first + count) % 64
    parts = [(some, first, first + count, [s]) for s in range(SEQUENCES)]
    return Batch(parts, output_rows=range(0, count * SEQUENCES, 97))
assert program.step(batch(0, 8))[0] == other.step(batch(0, 8))[0] == 0
targets = np.zeros(len(batch(8, 2).output_rows), np.int32)
outputs, top1 = np.zeros((len(targets), WIDTH), np.float32), np.zeros(len(targets), np.int32)
scores = np.zeros(len(targets), np.float32)
second = batch(8, 2)
c = second.c()
with no_memory():
    stepped = LIB.snello_step(program.handle, C.byref(c), pointer(outputs))
    said = last_error()
    scored = LIB.snello_score(program.handle, C.byref(c), pointer(targets), pointer(scores), pointer(top1))
    said_of_score = last_error()
assert (stepped, said, scored, said_of_score) == (-1, "step: out of memory", -1, "score: out of memory"), said
result, again, _ = program.score(second, targets)  # into memory of its own, not of the step that failed
assert result == 0 and not outputs.any()
assert again.tobytes() == other.score(second, targets)[1].tobytes()
"""
SAMPLE = """
VOCABULARY = 8_000_000
logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
history = np.arange(VOCABULARY - 50, VOCABULARY, dtype=np.int32)
settings = CSampling(1.0, 0.9, 0.0, 1.2, 0.1, 0.1, 0, 0, None, None, 7)
one = C.c_float()
def draw():
    return LIB.snello_sample(
        pointer(logits), VOCABULARY, C.byref(settings), pointer(history), len(history), 10, 60, C.byref(one)
    )
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for room in (0, 40, 72, 104, 10_000):  # MB: one array more has its memory every time
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (room << 20), hard))
    token = draw()
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert token >= 0 or last_error() == "sample: out of memory", last_error()
    if room == 0:
        assert token == -1
assert token >= 0
"""
MAKE = """
b = Builder()
table = b.table(np.ones((64, 4096), np.float32))
b.gather(b.op(ADD, [table, table], b.register(4096), f=[1.0]))
layers = (CCacheLayer * 1)(CCacheLayer(8, 128, 0, 0))
shared = pool(1)
with no_memory():
    try:
        b.build(threads=1, max_rows=60_000)
        made = None
    except Exception as error:
        made = str(error)
    no_cache = LIB.snello_cache_create(layers, 1, 1000)
    of_cache = last_error()
    probed = LIB.snello_probe_bandwidth(shared.handle, 1 << 30, 1)
    of_probe = last_error()
    no_pool = LIB.snello_pool_create(200)
    of_pool = last_error()
assert made == "cannot make the program: out of memory", made
assert not no_cache and of_cache.startswith("cannot map 1000 pages"), of_cache
assert probed == -1 and of_probe == "probe: out of memory", of_probe
assert not no_pool and of_pool.startswith("cannot start 200 threads"), of_pool
b.build(threads=1)
assert LIB.snello_program_output_width(None) == -1 and "no program" in last_error()
assert LIB.snello_program_arena_bytes(None) == 0
"""


@pytest.mark.parametrize("body", [STEP, SAMPLE, MAKE], ids=["step and score", "sample", "what makes something"])
def test_no_exception_crosses_the_boundary(body: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
