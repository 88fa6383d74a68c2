"""Matrices stored by channel: where every integer lies, products that are those of panels bit for bit, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from snello.native import core
from tests.native.harness import (
    EMBED,
    LINEAR,
    PRODUCT_ISAS,
    TRANSFORM,
    Builder,
    CoreError,
    Tensor,
    isa,
    plain,
    run_rows,
)
from tests.native.test_linear import Case, extras, product, random_matrix
from tests.oracle import F32, GroupedMatrix, Int8Matrix, linear_integer, quantize

FORMATS = [("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)]
SHAPES = [(1, 64), (17, 100), (130, 192), (250, 577), (2100, 128)]  # (N, K); the last: two blocks
ROWS = [1, 2, 3, 4, 5, 8, 13, 33]
MOST = max(ROWS)
BLOCK_SLABS = 16


def by_panel(matrix: Int8Matrix | GroupedMatrix) -> core.Tensor:
    if isinstance(matrix, Int8Matrix):
        return core.pack_int8(matrix.q, matrix.row_scale)
    return core.pack_grouped("int4", matrix.q, matrix.group_scale, matrix.row_scale, matrix.group_size)


def by_channel(matrix: Int8Matrix | GroupedMatrix) -> Tensor:
    t = core.to_channels(by_panel(matrix))
    return Tensor(t.data, core.FORMATS[t.format], t.rows, t.columns, t.group_size)


def stated_bytes(matrix: Int8Matrix | GroupedMatrix) -> NDArray[np.uint8]:
    """The layout of docs/numerics.md, value by value."""
    int4, full = isinstance(matrix, GroupedMatrix), matrix.padded()
    slab_rows, (n, k) = 128 if int4 else 64, full.q.shape
    padded = -(-n // slab_rows) * slab_rows
    q = np.pad(full.q, ((0, padded - n), (0, 0)), constant_values=8 if int4 else 0).view(np.uint8)
    parts = []
    for first in range(0, padded, BLOCK_SLABS * slab_rows):
        rows = slice(first, min(first + BLOCK_SLABS * slab_rows, padded))
        count = rows.stop - rows.start
        parts.append(np.pad(full.row_scale, (0, padded - n))[rows].astype(np.float32).view(np.uint8))
        if isinstance(full, GroupedMatrix):
            scale = np.pad(full.group_scale, ((0, padded - n), (0, 0)), constant_values=1)
            parts.append(np.ascontiguousarray(scale[rows].T).ravel())
        lines = np.zeros((k, count // slab_rows, 64), np.uint8)
        for row in range(count):
            slab, r = divmod(row, slab_rows)
            byte = 16 * (r % 16 // 4) + 4 * (r // 16 % 4) + r % 4
            lines[:, slab, byte] |= q[first + row] << (4 if r >= 64 else 0)
        parts.append(lines.ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("format_,group_size", FORMATS)
def test_bytes_and_the_way_back(format_: str, group_size: int, n: int, k: int) -> None:
    matrix = random_matrix(format_, group_size, n, k, np.random.default_rng([n, k, group_size]))
    panels = by_panel(matrix)
    channels = core.to_channels(panels)
    assert channels.data.tobytes() == stated_bytes(matrix).tobytes()
    back = core.from_channels(channels)
    assert (back.format, back.data.tobytes()) == (panels.format, panels.data.tobytes())
    assert core.unpack(channels).values.tobytes() == core.unpack(panels).values.tobytes()


def gaps(rng: np.random.Generator, k: int) -> F32:
    """Rows of which some are all zero, some have whole groups of zeros, some one value in a group, some none."""
    x = rng.standard_normal((MOST, k)).astype(np.float32)
    for row in range(MOST):
        x[row, rng.random(k) < rng.choice([0.0, 0.25, 0.5, 0.97])] = 0
    x[:, 32:64] = 0
    x[0, 33 % k] = 3
    x[2] = 0
    return x


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("format_,group_size", FORMATS)
def test_products_are_those_of_all_channels(format_: str, group_size: int, n: int, k: int) -> None:
    rng = np.random.default_rng([n, k, group_size])
    matrix = random_matrix(format_, group_size, n, k, rng)
    weights, x = by_channel(matrix), gaps(rng, k)
    for bias, onto in extras(n, rng):
        padded = np.pad(x, ((0, 0), (0, weights.columns - k)))
        wanted = linear_integer(quantize(padded), matrix, bias, None if onto is None else onto[:MOST])
        case = Case(weights, x, bias, onto, wanted)
        for name in PRODUCT_ISAS:
            with isa(name):
                for rows in ROWS:
                    got = product(case, rows, True, threads=1 + rows % 2)
                    assert got.tobytes() == wanted[:rows].tobytes(), (name, rows)


@pytest.mark.parametrize("format_,group_size", FORMATS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_values(format_: str, group_size: int, sign: int) -> None:
    n, k = 130, 640
    one = np.ones(n, np.float32)
    matrix: Int8Matrix | GroupedMatrix
    if format_ == "int8":
        matrix = Int8Matrix(np.full((n, k), sign * 127, np.int8), one)
    else:
        scale = np.full((n, k // group_size), 15, np.uint8)
        matrix = GroupedMatrix(np.full((n, k), 15 if sign > 0 else 0, np.uint8), scale, one, group_size)
    x = np.full((MOST, k), 127, np.float32)
    x[1::2] = -127
    x[2::4] = 0
    case = Case(by_channel(matrix), x, None, None, linear_integer(quantize(x), matrix))
    for name in PRODUCT_ISAS:
        with isa(name):
            for rows in ROWS:
                assert product(case, rows, True).tobytes() == case.wanted[:rows].tobytes(), (name, rows)


@pytest.mark.parametrize("step", [0.0, 0.02])
def test_thresholds_make_zeros(step: float) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((9, 192)).astype(np.float32)
    threshold = rng.uniform(0, 1.5, 192).astype(np.float32)
    x[3, 7] = threshold[7]  # not below: it stays
    x[4] = 0
    rows = quantize(x, np.float32(step)) if step else quantize(x)
    wanted = np.where(np.abs(x) < threshold, 0, rows.q).astype(np.float32) * rows.scale[:, None]
    assert 0.3 < (wanted == 0).mean() < 0.9
    unit = Int8Matrix(np.eye(192, dtype=np.int8), np.ones(192, np.float32))
    for name in PRODUCT_ISAS:
        for weights in (by_channel(unit), Tensor(by_panel(unit).data, core.FORMATS["int8"], 192, 192)):
            with isa(name):
                b = Builder()
                inputs = [b.table(x)]
                out = b.op(TRANSFORM, inputs, b.register(192, True), [-1, b.tensor(plain(threshold))], f=[step])
                b.gather(b.op(LINEAR, [out], b.register(192), [b.tensor(weights)]))
                assert run_rows(b.build(), 9).tobytes() == wanted.tobytes(), name


def test_joined_products_share_the_work() -> None:
    """Of one input, by panel and by channel, on more threads than slabs."""
    rng = np.random.default_rng(6)
    x = gaps(rng, 256)
    matrices = [random_matrix("int4", 128, n, 256, rng) for n in (2300, 40, 700)]
    wanted = np.concatenate([linear_integer(quantize(x), matrix) for matrix in matrices], axis=1)
    for threads in (1, 2, 3, 7):
        for rows in (1, 6):
            b = Builder()
            inputs, out, at = b.op(TRANSFORM, [b.table(x[:rows])], b.register(256, True)), b.register(3040), 0
            for index, matrix in enumerate(matrices):
                panels = by_panel(matrix)
                stored = Tensor(panels.data, 4, panels.rows, 256, 128) if index == 1 else by_channel(matrix)
                b.op(LINEAR, [inputs], out, [b.tensor(stored)], i=[0, at])
                at += stored.rows
            b.gather(out)
            assert run_rows(b.build(threads=threads), rows).tobytes() == wanted[:rows].tobytes(), (threads, rows)


def test_what_cannot_be_done_is_refused() -> None:
    matrix = by_channel(random_matrix("int4", 128, 40, 128, np.random.default_rng(0)))
    b = Builder()
    b.gather(b.op(EMBED, [], b.register(128), [b.tensor(matrix)], f=[1.0]))
    with pytest.raises(CoreError, match="stored by channel"):
        b.build()
    b = Builder()
    b.gather(b.op(LINEAR, [b.table(np.ones((1, 128), np.float32))], b.register(40), [b.tensor(matrix)]))
    with pytest.raises(CoreError, match="is float"):
        b.build()
    b = Builder()
    threshold = b.tensor(plain(np.ones(128, np.float32)))
    b.gather(b.op(TRANSFORM, [b.table(np.ones((1, 128), np.float32))], b.register(128), [-1, threshold]))
    with pytest.raises(CoreError, match="thresholds"):
        b.build()
    wide = core.pack_int8(np.zeros((1, core.MAX_CHANNELS + 64), np.int8), np.ones(1, np.float32))
    with pytest.raises(core.CoreError, match="at most 32768 columns"):
        core.to_channels(wide)
