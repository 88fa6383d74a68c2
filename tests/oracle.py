"""What the core has to compute, stated again in NumPy from docs/numerics.md alone.

Nothing here calls the core. Everything is exact: integers in int64, FP32 operations one rounding at a time, and a fused
multiply-add built from float64 with round-to-odd, so tests can compare bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
LANES = 16
BLOCK = 64


def fma(a: F32, b: F32, c: F32) -> F32:
    """`a * b + c` rounded once. The product is exact in float64; the sum is rounded to odd there, then to nearest."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    fix = (error != 0) & np.isfinite(total) & even
    return np.where(fix, odd, total).astype(np.float32)


def to_bf16(values: F32) -> NDArray[np.uint16]:
    """The upper half of FP32, nearest even (no NaN)."""
    raw = values.view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(values: NDArray[np.uint16]) -> F32:
    return (values.astype(np.uint32) << 16).view(np.float32)


def pad(matrix: NDArray[Any], rows: int, columns: int, value: int) -> NDArray[Any]:
    """Pads a matrix to multiples of `rows` and `columns`."""
    extra = ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % columns))
    return np.pad(matrix, extra, constant_values=value)


# ---- weights ----


@dataclass(frozen=True)
class Int8Matrix:
    q: NDArray[np.int8]
    row_scale: F32

    def padded(self) -> Int8Matrix:
        return Int8Matrix(pad(self.q, 1, BLOCK, 0), self.row_scale)

    def integers(self) -> NDArray[np.int64]:
        return self.q.astype(np.int64)

    def values(self) -> F32:
        return self.q.astype(np.float32) * self.row_scale[:, None]


@dataclass(frozen=True)
class GroupedMatrix:
    """INT4, or INT3, whose group scales are signed."""

    q: NDArray[np.uint8]
    group_scale: NDArray[Any]
    row_scale: F32
    group_size: int
    bits: int = 4

    @property
    def offset(self) -> int:
        return 8 if self.bits == 4 else 4

    def padded(self) -> GroupedMatrix:
        q = pad(self.q, 1, BLOCK, self.offset)
        groups = -(-q.shape[1] // self.group_size)
        scale = np.pad(self.group_scale, ((0, 0), (0, groups - self.group_scale.shape[1])), constant_values=1)
        return GroupedMatrix(q, scale, self.row_scale, self.group_size, self.bits)

    def integers(self) -> NDArray[np.int64]:
        scale = np.repeat(self.group_scale.astype(np.int64), self.group_size, axis=1)[:, : self.q.shape[1]]
        return scale * (self.q.astype(np.int64) - self.offset)

    def values(self) -> F32:
        return self.integers().astype(np.float32) * self.row_scale[:, None]


def pack_float(values: NDArray[Any]) -> Bytes:
    """F32, F16 (as float16): panels of [K][16], each padded to 64 bytes; BF16 (as uint16): panels of [K / 2][16][2]."""
    if values.dtype == np.uint16:
        values = pad(values, LANES, 2, 0)
        panels = values.reshape(-1, LANES, values.shape[1] // 2, 2).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(panels).view(np.uint8).ravel()
    panels = pad(values, LANES, 1, 0).reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1)
    raw = np.ascontiguousarray(panels).view(np.uint8).reshape(panels.shape[0], -1)
    return pad(raw, 1, BLOCK, 0).ravel()


def lines_of(values: Bytes) -> Bytes:
    """[rows, K] -> [panels, K / 4, 16, 4]."""
    rows, columns = values.shape
    return values.reshape(rows // LANES, LANES, columns // 4, 4).transpose(0, 2, 1, 3)


def pack_int8(matrix: Int8Matrix) -> Bytes:
    q = pad(matrix.q, LANES, BLOCK, 0)
    panels = q.shape[0] // LANES
    scale = np.pad(matrix.row_scale, (0, -len(matrix.row_scale) % LANES)).reshape(panels, LANES)
    sums = q.astype(np.int32).sum(axis=1, dtype=np.int32).reshape(panels, LANES)
    lines = lines_of(q.view(np.uint8)).reshape(panels, -1)
    return np.concatenate([scale.view(np.uint8), sums.view(np.uint8), lines], axis=1).ravel()


def pack_grouped(matrix: GroupedMatrix) -> Bytes:
    rows = matrix.q.shape[0]
    matrix = matrix.padded()
    q = pad(matrix.q, LANES, 1, matrix.offset)
    panels = q.shape[0] // LANES
    scale = np.pad(matrix.row_scale, (0, -rows % LANES)).reshape(panels, LANES)
    groups = pad(matrix.group_scale, LANES, 1, 1).reshape(panels, LANES, -1).transpose(0, 2, 1)
    group_bytes = pad(np.ascontiguousarray(groups).reshape(panels, -1), 1, BLOCK, 0)
    lines = lines_of(q)
    codes = (nibbles if matrix.bits == 4 else octals)(lines).reshape(panels, -1)
    return np.concatenate([scale.view(np.uint8), group_bytes.view(np.uint8), codes], axis=1).ravel()


def nibbles(lines: Bytes) -> Bytes:
    """Per 64 columns: the first 32 low, the others high."""
    halves = lines.reshape(len(lines), -1, 2, 8, LANES, 4)
    return halves[:, :, 0] | halves[:, :, 1] << 4


def octals(lines: Bytes) -> Bytes:
    """Per 32 columns, 8 lines of codes in 3: two whole ones each, and the rest in the two high bits."""
    a, b, c, d, e, f, g, h = np.moveaxis(lines.reshape(len(lines), -1, 8, LANES, 4), 2, 0)
    packed = a | b << 3 | (g & 3) << 6, c | d << 3 | (h & 3) << 6, e | f << 3 | (g >> 2) << 6 | (h >> 2) << 7
    return np.stack(packed, axis=2)


# ---- activations ----


@dataclass(frozen=True)
class Rows:
    """Quantized activations."""

    q: NDArray[np.int8]
    scale: F32


def quantize(x: F32, step: float = 0.0) -> Rows:
    """By each row's own scale, or by a given one."""
    largest = np.abs(x).max(axis=1)
    scale = (largest / np.float32(127)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / largest
        if step:
            scale = np.full_like(scale, step)
            inverse = np.full_like(scale, np.float32(1) / np.float32(step))
        inverse = np.minimum(inverse, np.finfo(np.float32).max)
        q = np.clip(np.rint(x * inverse[:, None]), -127, 127)
    return Rows(q.astype(np.int8), scale)


def hadamard(x: F32, block: int) -> F32:
    """Unnormalized, per block of columns: butterflies at distance 1, 2, 4, ..."""
    rows, columns = x.shape
    distance = 1
    while distance < block:
        pairs = x.reshape(rows, columns // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([a + b, a - b], axis=2).reshape(rows, columns)
        distance *= 2
    return x


def transform(x: F32, multiplier: F32 | None, block: int, width: int) -> F32:
    if multiplier is not None:
        x = x * multiplier
    x = np.pad(x, ((0, 0), (0, width - x.shape[1])))
    return hadamard(x, block) if block else x


# ---- products ----


def finish(y: F32, bias: F32 | None, onto: F32 | None) -> F32:
    if bias is not None:
        y = y + bias
    return y if onto is None else onto + y


def linear_integer(
    rows: Rows, matrix: Int8Matrix | GroupedMatrix, bias: F32 | None = None, onto: F32 | None = None
) -> F32:
    """Quantized activations: an exact integer sum, then three roundings."""
    acc = rows.q.astype(np.int64) @ matrix.padded().integers().T
    assert np.abs(acc).max(initial=0) < 2**31
    scale = rows.scale[:, None] * matrix.row_scale[None, :]
    return finish(acc.astype(np.int32).astype(np.float32) * scale, bias, onto)


def chain(x: F32, w: F32) -> F32:
    """One ascending chain of fused multiply-adds over k per output."""
    acc = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        acc = fma(np.broadcast_to(x[:, k : k + 1], acc.shape), np.broadcast_to(w[:, k], acc.shape), acc)
    return acc


def linear_float(x: F32, w: F32, bias: F32 | None = None, onto: F32 | None = None) -> F32:
    """FP32 activations and float weights, widened to FP32."""
    return finish(chain(x, w), bias, onto)


def to_half(x: F32) -> F32:
    """As BF16 rows: what lies below 2^-56 is 0."""
    return from_bf16(to_bf16(np.where(np.abs(x) < np.float32(2.0**-56), np.float32(0), x).astype(np.float32)))


def linear_halves(x: F32, w: F32, bias: F32 | None = None, onto: F32 | None = None) -> F32:
    """BF16 activations and weights (as FP32): of each 32 columns, a chain over the even ones plus one over the odd."""
    x, acc = to_half(x), np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(0, x.shape[1], 32):
        block, weights = x[:, k : k + 32], w[:, k : k + 32]
        acc = acc + (chain(block[:, ::2], weights[:, ::2]) + chain(block[:, 1::2], weights[:, 1::2]))
    return finish(acc, bias, onto)


def linear_weight_only(
    x: F32, matrix: Int8Matrix | GroupedMatrix, bias: F32 | None = None, onto: F32 | None = None
) -> F32:
    """FP32 activations and integer weights: the chain over the integers, then the row scale."""
    w = matrix.padded()
    return finish(chain(x, w.integers().astype(np.float32)) * w.row_scale, bias, onto)
