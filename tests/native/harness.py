"""Small programs for the native core: what the tests of operations, attention and sampling are written with."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snello.native.library import CBatch, CCacheLayer, COp, CRegister, CTensor, last_error, library

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4, "int3": 5}
(
    EMBED,
    NORM,
    TRANSFORM,
    LINEAR,
    ROPE,
    ATTENTION,
    ACTIVATE,
    ADD,
    GATHER,
    SCALE,
    ROUTE,
    DISPATCH,
    EXPERTS,
    COMBINE,
    ADAPT,
    CONVOLVE,
    HEAD,
    STORE,
) = range(18)
PAGE = 128
INT8_ROWS, BF16_ROWS = 1, 2


LIB = library()
ISAS = LIB.snello_isa_available().decode().split(",")
# What no processor chooses by itself: 256-bit VNNI by AVX-512's encoding, BF16 without its dot products, and the ways
# over tiles and such dot products wherever tests run.
PRODUCT_ISAS = [
    *ISAS,
    *(["avxvnni-evex", "avx512vnni-fma"] if "avx512vnni" in ISAS else []),
    "amx-emulated",
    "bf16-emulated",
]


class CoreError(RuntimeError):
    pass


def checked(result: int) -> int:
    if result < 0:
        raise CoreError(last_error())
    return result


@contextmanager
def isa(name: str) -> Iterator[None]:
    assert LIB.snello_isa_select(name.encode()) == name.encode()
    try:
        yield
    finally:
        LIB.snello_isa_select(ISAS[0].encode())


def pointer(array: NDArray[Any] | None) -> C.c_void_p:
    return C.c_void_p(None if array is None else array.ctypes.data)


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a multiple of 64 bytes."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    result = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def ints(values: Sequence[int] | I32) -> I32:
    return np.ascontiguousarray(values, np.int32)


class Pool:
    def __init__(self, num_threads: int = 1) -> None:
        self.handle = LIB.snello_pool_create(num_threads)
        if not self.handle:
            raise CoreError(last_error())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            LIB.snello_pool_destroy(C.c_void_p(self.handle))


_pools: dict[int, Pool] = {}


def pool(num_threads: int) -> Pool:
    return _pools.setdefault(num_threads, Pool(num_threads))


class Cache:
    def __init__(self, layers: list[tuple[int, int, str]], num_pages: int) -> None:
        array = (CCacheLayer * len(layers))(*[CCacheLayer(heads, dim, FORMATS[f]) for heads, dim, f in layers])
        self.num_pages = num_pages
        self.page_bytes = LIB.snello_cache_page_bytes(array, len(layers))
        self.handle = LIB.snello_cache_create(array, len(layers), num_pages)
        if not self.handle:
            raise CoreError(last_error())

    def copy_page(self, destination: int, source: int) -> None:
        checked(LIB.snello_cache_copy_page(C.c_void_p(self.handle), destination, source))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            LIB.snello_cache_destroy(C.c_void_p(self.handle))


@dataclass
class Tensor:
    data: NDArray[Any]
    format: int
    rows: int
    columns: int
    group_size: int = 0


def packed(format_: str, values: F32, group_size: int = 128) -> Tensor:
    """A packed matrix. Integers are rounded here in the simplest way: what they hold is not the tests' matter."""
    rows, columns = values.shape
    code = FORMATS[format_]
    padded = -(-columns // 64) * 64 if code >= 3 else columns
    group_size = group_size if code > 3 else 0
    data = aligned(np.zeros(LIB.snello_packed_bytes(code, rows, padded, group_size), np.uint8))
    if code < 3:
        source = np.ascontiguousarray(values, np.float32)
        checked(LIB.snello_pack_float(code, 0, pointer(source), rows, columns, pointer(data)))
        return Tensor(data, code, rows, columns, 0)
    limit = {3: 127, 4: 7, 5: 3}[code]
    scale = (np.abs(values).max(axis=1) / limit).astype(np.float16).astype(np.float32)
    scale[scale == 0] = 1
    q = np.zeros((rows, padded), np.int8)
    q[:, :columns] = np.clip(np.rint(values / scale[:, None]), -limit, limit)
    if code == 3:
        checked(LIB.snello_pack_int8(pointer(q), pointer(scale), rows, padded, pointer(data)))
    else:
        _pack_grouped(code, q, scale, group_size, data)
    return Tensor(data, code, rows, padded, group_size)


def _pack_grouped(code: int, q: NDArray[np.int8], scale: F32, group_size: int, data: NDArray[Any]) -> None:
    """With random group scales, whose sign counts in INT3."""
    rows, padded = q.shape
    generator = np.random.default_rng(rows * padded)
    group_scale = generator.integers(1, 16, (rows, -(-padded // group_size))).astype(np.int8)
    if code == FORMATS["int3"]:
        group_scale *= generator.choice(np.array([-1, 1], np.int8), group_scale.shape)
    codes = np.ascontiguousarray(q + (8 if code == FORMATS["int4"] else 4), np.uint8)
    scale = (scale / 8).astype(np.float16).astype(np.float32)
    pack = LIB.snello_pack_int4 if code == FORMATS["int4"] else LIB.snello_pack_int3
    checked(pack(pointer(codes), pointer(group_scale), pointer(scale), rows, padded, group_size, pointer(data)))


def plain(values: F32) -> Tensor:
    matrix = np.atleast_2d(np.ascontiguousarray(values, np.float32))
    return Tensor(aligned(matrix), 0, matrix.shape[0], matrix.shape[1])


def unpacked(tensor: Tensor) -> F32:
    values = np.empty((tensor.rows, tensor.columns), np.float32)
    LIB.snello_unpack(C.byref(c_tensor(tensor)), pointer(values), None, None, None, None)
    return values


def c_tensor(t: Tensor) -> CTensor:
    return CTensor(t.data.ctypes.data, t.data.nbytes, t.format, t.rows, t.columns, t.group_size)


@dataclass
class Builder:
    """Registers, tensors and operations on their way to a program."""

    registers: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[COp] = field(default_factory=list)

    def register(self, width: int, rows: int = 0) -> int:
        """`rows`: FP32, or INT8_ROWS, or BF16_ROWS."""
        self.registers.append((width, int(rows)))
        return len(self.registers) - 1

    def tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def op(
        self,
        kind: int,
        inputs: Sequence[int],
        out: int,
        tensors: Sequence[int] = (),
        i: Sequence[int] = (),
        f: Sequence[float] = (),
    ) -> int:
        def filled(values: Sequence[Any], n: int, rest: Any) -> list[Any]:
            return [*values, *[rest] * (n - len(values))]

        op = COp(kind=kind, out=out)
        op.inputs[:] = filled(inputs, 3, -1)
        op.tensor[:] = filled(tensors, 3, -1)
        op.i[:] = filled(i, 8, 0)
        op.f[:] = filled(f, 4, 0.0)
        self.ops.append(op)
        return out

    def table(self, values: F32) -> int:
        """A register whose row m is row token[m] of `values`, exactly."""
        return self.op(EMBED, [], self.register(values.shape[1]), [self.tensor(packed("f32", values))], f=[1.0])

    def attention(self, q: int, k: int, v: int, out: int, i: Sequence[int], f: Sequence[float]) -> int:
        """Stored in cache layer i[0], and attended to."""
        self.op(STORE, [k, v], -1, i=i[:1])
        return self.op(ATTENTION, [q], out, i=i, f=f)

    def head(self, source: int) -> int:
        return self.op(HEAD, [source], self.register(self.registers[source][0]))

    def gather(self, source: int) -> int:
        """Nothing is computed of output rows alone but what follows."""
        self.op(GATHER, [source], -1)
        return self.head(source)

    def build(self, cache: Cache | None = None, threads: int = 1, max_rows: int = 512, head_rows: int = 16) -> Program:
        return Program(self, cache, pool(threads), max_rows, head_rows)


class Program:
    def __init__(self, b: Builder, cache: Cache | None, pool_: Pool, max_rows: int, head_rows: int) -> None:
        self.keep = (b, cache, pool_)
        self.num_ops = len(b.ops)
        self.max_rows = max_rows
        ops = (COp * len(b.ops))(*b.ops)
        tensors = (CTensor * len(b.tensors))(*[c_tensor(t) for t in b.tensors])
        registers = (CRegister * len(b.registers))(*[CRegister(w, q) for w, q in b.registers])
        self.handle = LIB.snello_program_create(
            C.c_void_p(pool_.handle),
            ops,
            len(ops),
            tensors,
            len(tensors),
            registers,
            len(registers),
            C.c_void_p(cache.handle if cache else None),
            max_rows,
            head_rows,
        )
        if not self.handle:
            raise CoreError(last_error())
        self.width = LIB.snello_program_output_width(C.c_void_p(self.handle))

    @property
    def arena_bytes(self) -> int:
        return int(LIB.snello_program_arena_bytes(C.c_void_p(self.handle)))

    def step(self, batch: Batch) -> tuple[int, F32]:
        outputs = np.full((len(batch.output_rows), self.width), 12345.0, np.float32)
        result = LIB.snello_step(C.c_void_p(self.handle), C.byref(batch.c()), pointer(outputs))
        return checked(result), outputs

    def score(self, batch: Batch, targets: I32) -> tuple[int, F32, I32]:
        log_probability = np.zeros(len(batch.output_rows), np.float32)
        top1 = np.zeros(len(batch.output_rows), np.int32)
        result = LIB.snello_score(
            C.c_void_p(self.handle),
            C.byref(batch.c()),
            pointer(ints(targets)),
            pointer(log_probability),
            pointer(top1),
        )
        return checked(result), log_probability, top1

    def one_row(self) -> tuple[int, float, float]:
        """The way of steps of one row, and the median steps on tiles and on vectors."""
        seconds = np.zeros(2)
        return checked(LIB.snello_one_row(C.c_void_p(self.handle), pointer(seconds))), *seconds.tolist()

    def profile(self, enable: bool) -> NDArray[np.float64]:
        seconds = np.zeros(self.num_ops)
        checked(LIB.snello_profile(C.c_void_p(self.handle), int(enable), pointer(seconds)))
        return seconds

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            LIB.snello_program_destroy(C.c_void_p(self.handle))


class Batch:
    """Rows of several sequences. `parts`: per sequence (tokens, first position, length, pages)."""

    def __init__(
        self,
        parts: Sequence[tuple[Sequence[int] | I32, int, int, Sequence[int]]],
        output_rows: Sequence[int] | None = None,
        types: Sequence[int] | None = None,
    ) -> None:
        self.tokens = ints(np.concatenate([np.asarray(p[0], np.int32) for p in parts]))
        self.positions = ints(np.concatenate([np.arange(p[1], p[1] + len(p[0])) for p in parts]))
        self.sequences = ints(np.repeat(np.arange(len(parts)), [len(p[0]) for p in parts]))
        self.lengths = ints([p[2] for p in parts])
        self.pages_per_sequence = max(1, *[len(p[3]) for p in parts]) if len(parts) > 1 else max(1, len(parts[0][3]))
        self.page_tables = np.full((len(parts), self.pages_per_sequence), -1, np.int32)
        for row, part in zip(self.page_tables, parts, strict=True):
            row[: len(part[3])] = part[3]
        self.output_rows = ints(range(len(self.tokens)) if output_rows is None else output_rows)
        self.types = None if types is None else ints(types)

    def c(self) -> CBatch:
        return CBatch(
            len(self.tokens),
            len(self.lengths),
            self.pages_per_sequence,
            len(self.output_rows),
            pointer(self.tokens),
            pointer(self.types),
            pointer(self.positions),
            pointer(self.sequences),
            pointer(self.page_tables),
            pointer(self.lengths),
            pointer(self.output_rows),
        )


def pages_for(length: int, first: int = 0, step: int = 1) -> list[int]:
    return [first + step * i for i in range(-(-length // PAGE))]


def run_rows(program: Program, count: int) -> F32:
    """Outputs of a program without attention for tokens 0..count-1."""
    result, outputs = program.step(Batch([(range(count), 0, count, [])]))
    assert result == 0
    return outputs
