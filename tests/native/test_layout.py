"""Packed matrices: the bytes that docs/numerics.md says, their inverse, and what packing refuses."""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from snello.native import core
from snello.native.library import last_error, library
from tests.oracle import Bytes, GroupedMatrix, Int8Matrix, from_bf16, pack_float, pack_grouped, pack_int8, to_bf16

LIB = library()
SHAPES = [(1, 1), (16, 64), (17, 100), (40, 192), (250, 577)]
GROUPS = [32, 64, 128]


def random_scales(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    return rng.uniform(1e-4, 1e-2, rows).astype(np.float16).astype(np.float32)


def random_int8(rows: int, columns: int) -> Int8Matrix:
    rng = np.random.default_rng([rows, columns])
    return Int8Matrix(rng.integers(-127, 128, (rows, columns)).astype(np.int8), random_scales(rng, rows))


def random_grouped(bits: int, rows: int, columns: int, group_size: int) -> GroupedMatrix:
    rng = np.random.default_rng([rows, columns, group_size])
    q = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    group_scale = rng.integers(1, 16, (rows, -(-columns // group_size))).astype(np.uint8)
    if bits == 3:
        group_scale = group_scale.astype(np.int8) * rng.choice(np.array([-1, 1], np.int8), group_scale.shape)
    return GroupedMatrix(q, group_scale, random_scales(rng, rows), group_size, bits)


def packed(format_: int, rows: int, columns: int, group_size: int, pack: Any, *arguments: Any) -> Bytes:
    """What the core packs, checked to fill exactly the bytes that it announces."""
    size = LIB.snello_packed_bytes(format_, rows, columns, group_size)
    room = core.aligned_empty(size + 64)
    room[:] = 0xA5
    pointers = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    assert pack(*pointers, room.ctypes.data) == 0, last_error()
    assert np.all(room[size:] == 0xA5)
    return room[:size]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("format_", [0, 1, 2])
def test_float_bytes_and_inverse(rows: int, columns: int, format_: int) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    stored: NDArray[Any] = (values, values.astype(np.float16), to_bf16(values))[format_]
    exact = (values, values.astype(np.float16).astype(np.float32), from_bf16(to_bf16(values)))[format_]
    for source_format, source in ((0, values), (format_, stored)):
        data = packed(format_, rows, columns, 0, LIB.snello_pack_float, format_, source_format, source, rows, columns)
        assert data.tobytes() == pack_float(stored).tobytes()
    name = core.FORMAT_NAMES[format_]
    assert core.unpack(core.Tensor(data, name, rows, columns)).values.tobytes() == exact.tobytes()


@pytest.mark.parametrize("format_", [1, 2])
def test_narrowing_rounds_to_nearest_even(format_: int) -> None:
    edges = [0.0, -0.0, 65504, 65519.996, 65520, 1e9, -1e9, 6.1e-5, 5.97e-8, 2.98e-8, 2.9803e-8, 1e-45, np.inf]
    halfway = (1 + np.arange(64) / 2**12) * np.float32(3)
    values = np.concatenate([edges, halfway])[None, :].astype(np.float32)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = values.astype(np.float16) if format_ == 1 else to_bf16(values)
    data = packed(format_, 1, values.shape[1], 0, LIB.snello_pack_float, format_, 0, values, 1, values.shape[1])
    assert data.tobytes() == pack_float(stored).tobytes()


@pytest.mark.parametrize("rows,columns", SHAPES)
def test_int8_bytes_and_inverse(rows: int, columns: int) -> None:
    matrix = random_int8(rows, columns)
    data = packed(3, rows, columns, 0, LIB.snello_pack_int8, matrix.q, matrix.row_scale, rows, columns)
    assert data.tobytes() == pack_int8(matrix).tobytes()
    padded = matrix.padded()
    back = core.unpack(core.Tensor(data, "int8", rows, padded.q.shape[1]))
    assert back.q is not None and back.row_scale is not None
    assert np.array_equal(back.q, padded.q) and np.array_equal(back.row_scale, matrix.row_scale)
    assert back.values.tobytes() == padded.values().tobytes()


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("format_", ["int4", "int3"])
def test_grouped_bytes_and_inverse(format_: str, rows: int, columns: int, group_size: int) -> None:
    m = random_grouped(int(format_[-1]), rows, columns, group_size)
    pack = LIB.snello_pack_int4 if format_ == "int4" else LIB.snello_pack_int3
    arguments = (m.q, m.group_scale, m.row_scale, rows, columns, group_size)
    data = packed(core.FORMATS[format_], rows, columns, group_size, pack, *arguments)
    assert data.tobytes() == pack_grouped(m).tobytes()
    padded = m.padded()
    back = core.unpack(core.Tensor(data, format_, rows, padded.q.shape[1], group_size))
    assert back.q is not None and back.group_scale is not None and back.row_scale is not None
    assert np.array_equal(back.q, padded.q) and np.array_equal(back.group_scale, padded.group_scale)
    assert np.array_equal(back.row_scale, m.row_scale) and back.values.tobytes() == padded.values().tobytes()


REFUSED_SHAPES = [
    ((99, 16, 64, 0), "unknown format 99"),
    ((0, 0, 64, 0), "a matrix needs rows and columns, not 0 x 64"),
    ((0, 16, -1, 0), "a matrix needs rows and columns, not 16 x -1"),
    ((3, 16, 131136, 0), "an integer matrix has at most 131072 columns, not 131136"),
    ((4, 16, 64, 48), "the group size must be 32, 64 or 128, not 48"),
    ((5, 16, 64, 0), "the group size must be 32, 64 or 128, not 0"),
    ((3, 16, 64, 64), "only INT4 and INT3 have groups: group size 64"),
]


@pytest.mark.parametrize("shape,message", REFUSED_SHAPES)
def test_refused_shapes(shape: tuple[int, ...], message: str) -> None:
    assert LIB.snello_packed_bytes(*shape) == 0
    assert last_error() == message


def refused(pack: Any, *arguments: Any) -> str:
    pointers = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    assert pack(*pointers) < 0
    return last_error()


def test_values_out_of_range_are_refused() -> None:
    room = core.aligned_empty(1 << 16)
    m8, m4, m3 = random_int8(16, 64), random_grouped(4, 16, 64, 32), random_grouped(3, 16, 64, 32)
    m8.q[3, 5] = -128
    assert refused(LIB.snello_pack_int8, m8.q, m8.row_scale, 16, 64, room) == "pack_int8: q[3, 5] is -128"
    m4.q[1, 2] = 16
    arguments = (m4.q, m4.group_scale, m4.row_scale, 16, 64, 32, room)
    assert refused(LIB.snello_pack_int4, *arguments) == "pack_int4: q[1, 2] is 16, not 0..15"
    m4.group_scale[0, 1] = 0
    assert refused(LIB.snello_pack_int4, *arguments) == "pack_int4: group_scale[0, 1] is 0, not 1..15"
    m4.group_scale[0, 1] = 1
    m4.row_scale[7] = np.nan
    assert refused(LIB.snello_pack_int4, *arguments) == "the scale of row 7 is not finite"
    three = (m3.q, m3.group_scale, m3.row_scale, 16, 64, 32, room)
    m3.q[1, 2] = 8
    assert refused(LIB.snello_pack_int3, *three) == "pack_int3: q[1, 2] is 8, not 0..7"
    m3.group_scale[0, 1] = 0
    assert refused(LIB.snello_pack_int3, *three) == "pack_int3: group_scale[0, 1] is 0, not -15..15 without 0"
    m3.group_scale[0, 1] = -16
    assert refused(LIB.snello_pack_int3, *three) == "pack_int3: group_scale[0, 1] is -16, not -15..15 without 0"


def test_bad_pointers_are_refused() -> None:
    room, m = core.aligned_empty(1 << 16), random_int8(16, 64)
    aligned = "a packed matrix must start at a multiple of 64 bytes"
    assert refused(LIB.snello_pack_int8, m.q, m.row_scale, 16, 64, None) == aligned
    assert refused(LIB.snello_pack_int8, m.q, m.row_scale, 16, 64, room[1:]) == aligned
    assert "NULL" in refused(LIB.snello_pack_int8, None, m.row_scale, 16, 64, room)
    assert "NULL" in refused(LIB.snello_pack_float, 0, 0, None, 16, 64, room)
    assert "takes F32, F16 and BF16" in refused(LIB.snello_pack_float, 3, 0, m.q, 16, 64, room)


def test_unpack_refuses_what_is_not_there() -> None:
    m = random_int8(16, 64)
    data = packed(3, 16, 64, 0, LIB.snello_pack_int8, m.q, m.row_scale, 16, 64)
    tensor, room = core.Tensor(data, "int8", 16, 64), np.empty(4096, np.uint8)
    nothing = [None] * 5

    def unpack(t: core.Tensor, **outputs: NDArray[Any]) -> str:
        names = ("values", "q8", "q4", "group_scale", "row_scale")
        return refused(LIB.snello_unpack, c.byref(t.to_c()), *(outputs.get(name) for name in names))

    assert LIB.snello_unpack(c.byref(tensor.to_c()), *nothing) == 0
    assert unpack(tensor, q4=room) == "only an INT4 or INT3 matrix unpacks to q4 and group scales"
    assert "has 1152 bytes, not 1088" in unpack(core.Tensor(data[:-64], "int8", 16, 64))
    assert "a multiple of 64" in unpack(core.Tensor(data, "int8", 16, 60))
    plain = core.Tensor(core.aligned_empty(4096), "fp32", 16, 64)
    assert unpack(plain, row_scale=room) == "only an integer matrix has row scales"
    assert unpack(plain, q8=room) == "only an INT8 matrix unpacks to q8"
