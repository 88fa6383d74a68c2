"""Matrix products and the transform of their input: the bytes of the NumPy statement, on every instruction set.

One oracle result serves every number of rows: a product of fewer rows is a prefix of it, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from snello.native import core
from tests.native.harness import (
    BF16_ROWS,
    EMBED,
    INT8_ROWS,
    ISAS,
    LINEAR,
    PRODUCT_ISAS,
    TRANSFORM,
    Batch,
    Builder,
    Tensor,
    isa,
    plain,
    run_rows,
)
from tests.oracle import (
    F32,
    GroupedMatrix,
    Int8Matrix,
    Rows,
    from_bf16,
    hadamard,
    linear_float,
    linear_halves,
    linear_integer,
    linear_weight_only,
    quantize,
    to_bf16,
    transform,
)

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 24, 25, 31, 33, 67]
MOST = max(ROWS)
SHAPES = [(1, 64), (17, 100), (40, 192), (250, 577)]  # (N, K)
FORMATS = [("int8", 0), *((name, size) for name in ("int4", "int3") for size in (32, 64, 128))]


@dataclass(frozen=True)
class Case:
    """A product: packed weights, bias or none, what it adds onto or nothing, the oracle's outputs."""

    weights: Tensor
    x: F32
    bias: F32 | None
    onto: F32 | None
    wanted: F32


def packed(matrix: Int8Matrix | GroupedMatrix) -> Tensor:
    if isinstance(matrix, Int8Matrix):
        t = core.pack_int8(matrix.q, matrix.row_scale)
    else:
        parts = matrix.q, matrix.group_scale, matrix.row_scale, matrix.group_size
        t = core.pack_grouped(f"int{matrix.bits}", *parts)
    return Tensor(t.data, core.FORMATS[t.format], t.rows, t.columns, t.group_size)


def random_matrix(
    format_: str, group_size: int, n: int, k: int, rng: np.random.Generator
) -> Int8Matrix | GroupedMatrix:
    scale = rng.uniform(1e-3, 1e-2, n).astype(np.float16).astype(np.float32)
    if format_ == "int8":
        return Int8Matrix(rng.integers(-127, 128, (n, k)).astype(np.int8), scale)
    groups = (n, -(-k // group_size))
    if format_ == "int4":
        q = rng.integers(0, 16, (n, k)).astype(np.uint8)
        return GroupedMatrix(q, rng.integers(1, 16, groups).astype(np.uint8), scale, group_size)
    signs = rng.choice([-1, 1], groups)
    q = rng.integers(0, 8, (n, k)).astype(np.uint8)
    return GroupedMatrix(q, (signs * rng.integers(1, 16, groups)).astype(np.int8), scale, group_size, 3)


def extreme_matrix(format_: str, group_size: int, n: int, k: int, sign: int) -> Int8Matrix | GroupedMatrix:
    """Every weight as large as the format goes: 127, 15 * 7 and 15 * -8, and for INT3 -4 under scales of both signs."""
    one, groups = np.ones(n, np.float32), (n, k // max(group_size, 1))
    if format_ == "int8":
        return Int8Matrix(np.full((n, k), sign * 127, np.int8), one)
    if format_ == "int4":
        q = np.full((n, k), 15 if sign > 0 else 0, np.uint8)
        return GroupedMatrix(q, np.full(groups, 15, np.uint8), one, group_size)
    return GroupedMatrix(np.zeros((n, k), np.uint8), np.full(groups, -15 * sign, np.int8), one, group_size, 3)


def extras(n: int, rng: np.random.Generator) -> Iterator[tuple[F32 | None, F32 | None]]:
    """(bias, onto): neither and both."""
    yield None, None
    yield rng.standard_normal(n).astype(np.float32), rng.standard_normal((MOST, n)).astype(np.float32)


def product(case: Case, rows: int, prepared: int, threads: int = 1) -> F32:
    """The core's outputs for the first rows, two columns into a wider register."""
    b = Builder()
    n = case.weights.rows
    width = case.weights.columns
    x = b.table(case.x[:rows])
    if case.weights.format >= 3 or prepared:
        x = b.op(TRANSFORM, [x], b.register(-(-width // 64) * 64, prepared))
    around = np.zeros((rows, n + 4), np.float32)
    if case.onto is not None:
        around[:, 2:-2] = case.onto[:rows]
    out = b.table(around)
    bias = -1 if case.bias is None else b.tensor(plain(case.bias))
    b.op(LINEAR, [x], out, [b.tensor(case.weights), bias], i=[int(case.onto is not None), 2])
    b.gather(out)
    outputs = run_rows(b.build(threads=threads, max_rows=max(512, rows)), rows)
    assert not outputs[:, :2].any() and not outputs[:, -2:].any()
    return np.ascontiguousarray(outputs[:, 2:-2])


def check(case: Case, quantized: int) -> None:
    for name in PRODUCT_ISAS:
        with isa(name):
            for rows in ROWS:
                got = product(case, rows, quantized, threads=1 + rows % 2)
                assert got.tobytes() == case.wanted[:rows].tobytes(), (name, rows, case.weights.rows)


@pytest.mark.parametrize("n,k", [(1, 1), (17, 37), (40, 192), (250, 577)])
@pytest.mark.parametrize("format_", ["fp32", "fp16", "bf16"])
def test_float_weights(format_: str, n: int, k: int) -> None:
    rng = np.random.default_rng([n, k])
    w, x = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (n, MOST))
    exact = {"fp32": w, "fp16": w.astype(np.float16).astype(np.float32), "bf16": from_bf16(to_bf16(w))}[format_]
    weights = packed_float(format_, w)
    for bias, onto in extras(n, rng):
        check(Case(weights, x, bias, onto, linear_float(x, exact, bias, onto)), quantized=False)


def packed_float(format_: str, w: F32) -> Tensor:
    t = core.pack_float(format_, w, "fp32")
    return Tensor(t.data, core.FORMATS[format_], t.rows, t.columns)


@pytest.mark.parametrize("n,k", [(1, 1), (17, 37), (40, 192), (96, 512), (250, 577), (200, 800), (16, 8224)])
def test_bf16_rows_times_bf16_weights(n: int, k: int) -> None:
    """Magnitudes from below what counts as 0 to 1e9, so that the order of sums and what is dropped are seen."""
    rng = np.random.default_rng([n, k])
    w, x = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (n, MOST))
    x *= np.float32(10) ** rng.integers(-20, 10, x.shape).astype(np.float32)
    x[:, ::7] = 1e-44
    for bias, onto in extras(n, rng):
        wanted = linear_halves(x, from_bf16(to_bf16(w)), bias, onto)
        check(Case(packed_float("bf16", w), x, bias, onto, wanted), BF16_ROWS)


def test_bf16_rows_are_no_longer_than_they_say() -> None:
    """What lies behind the last column is 0 whatever was in the register before."""
    rng = np.random.default_rng(5)
    w, x = rng.standard_normal((32, 37)).astype(np.float32), rng.standard_normal((9, 37)).astype(np.float32)
    long = np.full((9, 64), 1e30, np.float32)
    wanted = linear_halves(x, from_bf16(to_bf16(w)))
    for name in PRODUCT_ISAS:
        with isa(name):
            b = Builder()
            halves = b.register(64, BF16_ROWS)
            b.op(TRANSFORM, [b.table(long)], halves)
            b.op(TRANSFORM, [b.table(x)], halves)
            b.gather(b.op(LINEAR, [halves], b.register(32), [b.tensor(packed_float("bf16", w))]))
            assert run_rows(b.build(), 9).tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("format_,group_size", FORMATS)
def test_integer_weights(format_: str, group_size: int, n: int, k: int) -> None:
    rng = np.random.default_rng([n, k, group_size])
    matrix = random_matrix(format_, group_size, n, k, rng)
    weights, x = packed(matrix), rng.standard_normal((MOST, k)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, weights.columns - k)))
    for bias, onto in extras(n, rng):
        wanted = linear_integer(quantize(padded), matrix, bias, onto)
        check(Case(weights, x, bias, onto, wanted), quantized=True)
        wanted = linear_weight_only(padded, matrix, bias, onto)
        check(Case(weights, x, bias, onto, wanted), quantized=False)


@pytest.mark.parametrize("format_", ["int8", "int4", "int3", "bf16", "fp32"])
def test_threads_take_rows_of_long_prompts(format_: str) -> None:
    """Each some rows of all outputs, and not half of the outputs of all rows."""
    rng = np.random.default_rng(7)
    n, k, count = 250, 192, 500
    x, onto = (rng.standard_normal((count, width)).astype(np.float32) for width in (k, n))
    bias = rng.standard_normal(n).astype(np.float32)
    w = rng.standard_normal((n, k)).astype(np.float32)
    if format_ == "fp32":
        weights, prepared, wanted = packed_float("fp32", w), 0, linear_float(x, w, bias, onto)
    elif format_ == "bf16":
        weights, prepared = packed_float("bf16", w), BF16_ROWS
        wanted = linear_halves(x, from_bf16(to_bf16(w)), bias, onto)
    else:
        matrix = random_matrix(format_, 0 if format_ == "int8" else 64, n, k, rng)
        weights, prepared, wanted = packed(matrix), INT8_ROWS, linear_integer(quantize(x), matrix, bias, onto)
    for name in PRODUCT_ISAS:
        with isa(name):
            for rows, threads in ((500, 1), (255, 2), (256, 2), (500, 2), (500, 3), (500, 16)):
                got = product(Case(weights, x, bias, onto, wanted), rows, prepared, threads)
                assert got.tobytes() == wanted[:rows].tobytes(), (name, rows, threads)


@pytest.mark.parametrize("format_,group_size", FORMATS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_values(format_: str, group_size: int, sign: int) -> None:
    """The largest sums there are: no 16-bit step on the way may saturate. 640 columns: more than one chunk."""
    n, k = 33, 640
    matrix = extreme_matrix(format_, group_size, n, k, sign)
    x = np.full((MOST, k), 127, np.float32)
    x[1::2] = -127
    x[2::4] = 0
    wanted = linear_integer(quantize(x), matrix)
    check(Case(packed(matrix), x, None, None, wanted), quantized=True)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("format_", ["int8", "int4", "int3"])
def test_sums_fill_int32(format_: str, sign: int) -> None:
    k = 131072
    matrix = extreme_matrix(format_, 0 if format_ == "int8" else 32, 1, k, -1 if format_ == "int4" else sign)
    x = np.full((MOST, k), sign * 127, np.float32)
    rows = Rows(x[:1].astype(np.int8), np.ones(1, np.float32))
    wanted = np.broadcast_to(linear_integer(rows, matrix), (MOST, 1))
    case = Case(packed(matrix), x, None, None, np.ascontiguousarray(wanted))
    for name in PRODUCT_ISAS:
        with isa(name):
            for count in (1, 3, 33):
                assert product(case, count, True).tobytes() == case.wanted[:count].tobytes(), (name, count)


def transformed(x: F32, multiplier: F32 | None, block: int, width: int, quantized: bool, step: float = 0.0) -> F32:
    """The core's transform; a quantized one is read back through an identity matrix, exactly."""
    b = Builder()
    vector = -1 if multiplier is None else b.tensor(plain(multiplier))
    out = b.op(TRANSFORM, [b.table(x)], b.register(width, quantized), [vector], i=[block], f=[step])
    if quantized:
        unit = Int8Matrix(np.eye(width, dtype=np.int8), np.ones(width, np.float32))
        out = b.op(LINEAR, [out], b.register(width), [b.tensor(packed(unit))])
    b.gather(out)
    return run_rows(b.build(), len(x))


@pytest.mark.parametrize(
    "columns,width,block", [(100, 128, 64), (96, 128, 128), (192, 192, 64), (384, 384, 128), (70, 128, 0)]
)
@pytest.mark.parametrize("multiplied", [False, True])
def test_transform(columns: int, width: int, block: int, multiplied: bool) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((9, columns)).astype(np.float32) * np.float32(10) ** np.arange(-40, 5, 5)[:, None]
    x = x.astype(np.float32)
    x[4] = 0
    x[5] = np.float32(1e-45)
    multiplier = rng.uniform(0.5, 2, columns).astype(np.float32) if multiplied else None
    wanted = transform(x, multiplier, block, width)
    rows = quantize(wanted)
    read_back = rows.q.astype(np.float32) * rows.scale[:, None]
    for name in ISAS:
        with isa(name):
            assert transformed(x, multiplier, block, width, False).tobytes() == wanted.tobytes(), name
            assert transformed(x, multiplier, block, width, True).tobytes() == read_back.tobytes(), name


def test_hadamard_is_its_own_inverse_but_for_the_block() -> None:
    x = np.random.default_rng(0).integers(-100, 100, (3, 256)).astype(np.float32)
    assert np.array_equal(hadamard(hadamard(x, 128), 128), x * 128)


@pytest.mark.parametrize(
    "columns,width,block", [(100, 128, 64), (96, 128, 128), (192, 192, 64), (384, 384, 128), (70, 128, 0)]
)
@pytest.mark.parametrize("step", [0.05, 1e-6, 1e-42, 3e37])
def test_transform_by_a_given_scale(columns: int, width: int, block: int, step: float) -> None:
    """What lies beyond 127 steps is cut to it; rows do not depend on one another."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((9, columns)).astype(np.float32) * np.float32(10) ** np.arange(-6, 3, 1)[:, None]
    x = x.astype(np.float32)
    x[4] = 0
    multiplier = rng.uniform(0.5, 2, columns).astype(np.float32)
    wanted = transform(x, multiplier, block, width)
    with np.errstate(over="ignore"):
        rows = quantize(wanted, np.float32(step))
    read_back = rows.q.astype(np.float32) * rows.scale[:, None]
    if step == 0.05:
        assert (np.abs(rows.q) == 127).any() and (np.abs(wanted) > 127 * 0.05).any()
    for name in ISAS:
        with isa(name):
            assert transformed(x, multiplier, block, width, True, step).tobytes() == read_back.tobytes(), name
            one = transformed(x[3:4], multiplier, block, width, True, step)
            assert one.tobytes() == read_back[3:4].tobytes(), name


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("kind", "step"), [(0, 0.0), (INT8_ROWS, 0.0), (INT8_ROWS, 0.5), (BF16_ROWS, 0.0)])
def test_a_row_that_is_not_finite_is_named(bad: float, kind: int, step: float) -> None:
    x = np.ones((5, 64), np.float32)
    x[3, 63] = bad
    for name in ISAS:
        with isa(name):
            b = Builder()
            out = b.op(TRANSFORM, [b.table(x)], b.register(64, kind), f=[step])
            if kind:
                unit = Int8Matrix(np.eye(64, dtype=np.int8), np.ones(64, np.float32))
                matrix = packed(unit) if kind == INT8_ROWS else packed_float("bf16", np.eye(64, dtype=np.float32))
                out = b.op(LINEAR, [out], b.register(64), [b.tensor(matrix)])
            b.gather(out)
            result, outputs = b.build().step(Batch([([row], 0, 1, []) for row in range(5)]))
            assert result == 1 + 3
            assert np.array_equal(outputs[[0, 1, 2, 4]], x[[0, 1, 2, 4]])


def test_embedding_reads_packed_rows() -> None:
    """Rows of a packed matrix come back as the oracle's values, from every format."""
    rng = np.random.default_rng(3)
    for format_, group_size in FORMATS:
        matrix = random_matrix(format_, group_size, 40, 192, rng)
        for name in ISAS:
            with isa(name):
                b = Builder()
                b.gather(b.op(EMBED, [], b.register(192), [b.tensor(packed(matrix))], f=[1.0]))
                assert run_rows(b.build(), 40).tobytes() == matrix.values().tobytes()
