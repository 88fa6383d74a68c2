"""The C ABI in Python's words: arrays in, arrays out, objects that close.

Every wrapper keeps the arrays that it hands to the core alive and contiguous. What a caller in this package gets wrong
is a bug: the one-line message of the core comes up as a `CoreError`. Shapes: N outputs, K inputs of a matrix, M rows.
"""

from __future__ import annotations

import ctypes as c
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError
from snello.native.library import (
    ABI_VERSION,
    CBatch,
    CCacheLayer,
    COp,
    CRegister,
    CTensor,
    last_error,
    library,
)

__all__ = ["ABI_VERSION"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

FORMATS = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "int4": 4, "int3": 5, "int8-channels": 6, "int4-channels": 7}
GROUP_SCALE = {"int4": np.uint8, "int3": np.int8}  # how scales of groups are stored
CHANNELS = "-channels"  # stored by channel: inputs that are 0 are not read
MAX_CHANNELS = 32_768
RowKind: TypeAlias = Literal["fp32", "int8", "bf16"]  # what a register holds, by its number in the core
FORMAT_NAMES = {number: name for name, number in FORMATS.items()}
PANEL_ROWS = 16
BLOCK_COLUMNS = 64
PAGE_POSITIONS = 128
ALIGNMENT = 64
ONE_ROW_ON_TILES = 1
# Raised whenever the core gives other bits for the same packed model and tokens: what was stored under another number
# is not used. tests/native/test_version.py notices.
NUMERICS_VERSION = 5


class CoreError(RuntimeError):
    """The core refused a call: a bug in what called it."""


class NotFinite(SnelloError):
    """The activations of a row of a batch overflowed, and all that follows from it; `row` is the first.

    The rows of other sequences are right: without this one the batch can be run again, to the same bits.
    """

    def __init__(self, row: int) -> None:
        hint = "the weights or the input are damaged, or the model overflows its number type"
        super().__init__(f"the activations of row {row} are not finite", hint)
        self.row = row


class OpKind(IntEnum):
    EMBED = 0
    NORM = 1
    TRANSFORM = 2
    LINEAR = 3
    ROPE = 4
    ATTENTION = 5
    ACTIVATE = 6
    ADD = 7
    GATHER = 8
    SCALE = 9
    ROUTE = 10
    DISPATCH = 11
    EXPERTS = 12
    COMBINE = 13
    ADAPT = 14
    CONVOLVE = 15
    HEAD = 16
    STORE = 17


# ---- instruction sets


def select_isa(name: str | None) -> str:
    """Selects an instruction set for the process (None: SNELLO_ISA, else the best) and returns its name."""
    selected = library().snello_isa_select(None if name is None else name.encode())
    if selected is None:
        raise SnelloError(last_error(), f"this CPU runs: {', '.join(available_isas())}")
    return selected.decode()  # type: ignore[no-any-return]


def available_isas() -> list[str]:
    """The sets that this CPU runs, best first."""
    return library().snello_isa_available().decode().split(",")  # type: ignore[no-any-return]


def amx_status() -> str:
    """AMX here: "absent", "refused" (by the operating system), "failed" (its trial) or "trusted"."""
    return library().snello_amx().decode()  # type: ignore[no-any-return]


def multiplies_bf16() -> bool:
    """Whether the selected set multiplies BF16 as it is: it can, and a trial gave the bits of docs/numerics.md."""
    return bool(library().snello_multiplies_bf16())


# ---- matrices


def aligned_empty(num_bytes: int) -> Bytes:
    """Uninitialized bytes that begin at a multiple of 64."""
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes]


@dataclass(frozen=True)
class Tensor:
    """A packed matrix [rows, columns], or plain FP32 values where an operation asks for them; `data` is aligned."""

    data: Bytes
    format: str
    rows: int
    columns: int
    group_size: int = 0

    @classmethod
    def plain(cls, values: Floats) -> Tensor:
        """Plain FP32 values [columns] or [rows, columns], copied to aligned memory."""
        rows = 1 if values.ndim == 1 else values.shape[0]
        data = aligned_empty(values.size * 4)
        data[:] = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        return cls(data, "fp32", rows, values.shape[-1])

    vector = plain

    def to_c(self) -> CTensor:
        pointer, size = self.data.ctypes.data if self.data.size else None, self.data.nbytes
        return CTensor(pointer, size, FORMATS[self.format], self.rows, self.columns, self.group_size)


@dataclass(frozen=True)
class Unpacked:
    """`values` FP32 [N, K]; of integer matrices also q, scales per row [N] and, INT4 and INT3, per group
    [N, groups]."""

    values: Floats
    q: npt.NDArray[Any] | None = None
    row_scale: Floats | None = None
    group_scale: npt.NDArray[Any] | None = None


def packed_bytes(format: str, rows: int, columns: int, group_size: int = 0) -> int:
    size = int(library().snello_packed_bytes(FORMATS[format], rows, columns, group_size))
    if size == 0:
        raise CoreError(last_error())
    return size


def pack_float(format: str, source: npt.NDArray[Any], source_format: str) -> Tensor:
    """Packs a plain matrix [N, K] whose items are fp32, fp16 or bf16 (two raw bytes each) as `format`."""
    source = np.ascontiguousarray(source)
    rows, columns = source.shape
    data = aligned_empty(packed_bytes(format, rows, columns))
    check(
        library().snello_pack_float(
            FORMATS[format], FORMATS[source_format], source.ctypes.data, rows, columns, data.ctypes.data
        )
    )
    return Tensor(data, format, rows, columns)


def pack_int8(q: npt.NDArray[np.int8], row_scale: Floats) -> Tensor:
    """q [N, K] in -127..127; row_scale [N]. The tensor's columns are K padded to a multiple of 64."""
    q, row_scale = np.ascontiguousarray(q, np.int8), np.ascontiguousarray(row_scale, np.float32)
    rows, columns = q.shape
    data = aligned_empty(packed_bytes("int8", rows, columns))
    check(library().snello_pack_int8(q.ctypes.data, row_scale.ctypes.data, rows, columns, data.ctypes.data))
    return Tensor(data, "int8", rows, _padded(columns))


def pack_grouped(format: str, q: Bytes, group_scale: npt.NDArray[Any], row_scale: Floats, group_size: int) -> Tensor:
    """INT4: q [N, K] in 0..15, group_scale [N, ceil(K / group)] in 1..15; INT3: 0..7, -15..15 without 0. Also
    row_scale [N]. Columns are padded to 64."""
    pack = {"int4": library().snello_pack_int4, "int3": library().snello_pack_int3}[format]
    q, group_scale = np.ascontiguousarray(q, np.uint8), np.ascontiguousarray(group_scale, GROUP_SCALE[format])
    row_scale = np.ascontiguousarray(row_scale, np.float32)
    rows, columns = q.shape
    assert group_scale.shape == (rows, -(-columns // group_size)) and row_scale.shape == (rows,)
    data = aligned_empty(packed_bytes(format, rows, columns, group_size))
    pointers = (q.ctypes.data, group_scale.ctypes.data, row_scale.ctypes.data)
    check(pack(*pointers, rows, columns, group_size, data.ctypes.data))
    return Tensor(data, format, rows, _padded(columns), group_size)


def _padded(columns: int) -> int:
    return -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS


def to_channels(tensor: Tensor) -> Tensor:
    """An INT8 or INT4 matrix stored by channel, at most MAX_CHANNELS columns: the same integers."""
    return _moved(tensor, tensor.format + CHANNELS, library().snello_to_channels)


def from_channels(tensor: Tensor) -> Tensor:
    """The inverse of `to_channels`."""
    return _moved(tensor, tensor.format.removesuffix(CHANNELS), library().snello_from_channels)


def _moved(tensor: Tensor, format: str, move: Callable[..., int]) -> Tensor:
    data = aligned_empty(packed_bytes(format, tensor.rows, tensor.columns, tensor.group_size))
    check(move(c.byref(tensor.to_c()), data.ctypes.data))
    return replace(tensor, data=data, format=format)


def unpack(tensor: Tensor) -> Unpacked:
    """The inverse of packing."""
    if tensor.format.endswith(CHANNELS):
        tensor = from_channels(tensor)
    rows, columns = tensor.rows, tensor.columns
    values = np.empty((rows, columns), np.float32)
    if tensor.format in ("fp32", "fp16", "bf16"):
        _unpack(tensor, values=values)
        return Unpacked(values)
    row_scale = np.empty(rows, np.float32)
    if tensor.format == "int8":
        q8 = np.empty((rows, columns), np.int8)
        _unpack(tensor, values=values, q8=q8, row_scale=row_scale)
        return Unpacked(values, q8, row_scale)
    q4 = np.empty((rows, columns), np.uint8)
    group_scale = np.empty((rows, -(-columns // tensor.group_size)), GROUP_SCALE[tensor.format])
    _unpack(tensor, values=values, q4=q4, group_scale=group_scale, row_scale=row_scale)
    return Unpacked(values, q4, row_scale, group_scale)


def _unpack(tensor: Tensor, **outputs: npt.NDArray[Any]) -> None:
    pointers = [_pointer(outputs.get(name)) for name in ("values", "q8", "q4", "group_scale", "row_scale")]
    check(library().snello_unpack(c.byref(tensor.to_c()), *pointers))


# ---- objects of the core


class _Object:
    """An object of the core; `close` frees it, which the end of this one does at the latest."""

    def __init__(self, handle: int | None, destroy: Callable[[int], None]) -> None:
        self._handle = _created(handle)
        self.close = weakref.finalize(self, destroy, self._handle)

    @property
    def handle(self) -> int:
        """What the core knows it by.

        Raises:
            SnelloError: it was closed.
        """
        if not self.close.alive:
            raise SnelloError("the model is closed", "open it again, or close it later")
        return self._handle


class Pool(_Object):
    """`num_threads` threads, the caller one of them."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        super().__init__(library().snello_pool_create(num_threads), library().snello_pool_destroy)


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values, or with `state_rows` the FP32 state of a convolution: that many rows of `head_dim` a page."""

    num_kv_heads: int
    head_dim: int
    format: int
    state_rows: int = 0


class Cache(_Object):
    """Pages of keys and values of all layers."""

    def __init__(self, layers: Sequence[CacheLayer], num_pages: int) -> None:
        self.num_pages, self.page_bytes = num_pages, cache_page_bytes(layers)
        created = library().snello_cache_create(_layers(layers), len(layers), num_pages)
        super().__init__(created, library().snello_cache_destroy)

    def copy_page(self, destination: int, source: int) -> None:
        check(library().snello_cache_copy_page(self.handle, destination, source))

    def page(self, page: int) -> Bytes:
        """The bytes of a page, no copy: valid while the cache is, to be read or written between steps."""
        memory = (c.c_uint8 * self.page_bytes).from_address(_created(library().snello_cache_page(self.handle, page)))
        return np.ctypeslib.as_array(memory)


def cache_page_bytes(layers: Sequence[CacheLayer]) -> int:
    """Bytes of one page of `PAGE_POSITIONS` positions in all layers."""
    return int(library().snello_cache_page_bytes(_layers(layers), len(layers)))


def _layers(layers: Sequence[CacheLayer]) -> Any:
    return (CCacheLayer * len(layers))(
        *(CCacheLayer(x.num_kv_heads, x.head_dim, x.format, x.state_rows) for x in layers)
    )


@dataclass(frozen=True)
class Register:
    """`width` values a row: FP32, BF16, or INT8 with scale and sums."""

    width: int
    rows: RowKind = "fp32"


@dataclass(frozen=True)
class Op:
    """One operation; the meaning of i and f is in csrc/snello.h. `out`: -1 for those that write no register."""

    kind: OpKind
    inputs: tuple[int, ...]
    out: int
    tensors: tuple[int, ...] = ()
    i: tuple[int, ...] = ()
    f: tuple[float, ...] = ()

    def to_c(self) -> COp:
        return COp(
            int(self.kind),
            (c.c_int32 * 3)(*_filled(self.inputs, 3, -1)),
            self.out,
            (c.c_int32 * 3)(*_filled(self.tensors, 3, -1)),
            (c.c_int32 * 8)(*_filled(self.i, 8, 0)),
            (c.c_float * 4)(*_filled(self.f, 4, 0.0)),
        )


@dataclass(frozen=True)
class Batch:
    """Rows of one step: see `snello_batch` in csrc/snello.h. All int32 and contiguous."""

    tokens: Ints  # (M,)
    positions: Ints  # (M,)
    sequences: Ints  # (M,)
    page_tables: Ints  # (sequences, pages)
    lengths: Ints  # (sequences,)
    output_rows: Ints  # (outputs,)
    types: Ints | None = None  # (M,)
    adapters: Ints | None = None  # (M,), -1: none

    def to_c(self) -> CBatch:
        sequences, pages = self.page_tables.shape
        return CBatch(
            len(self.tokens),
            sequences,
            pages,
            len(self.output_rows),
            *(_int_pointer(x) for x in (self.tokens, self.types, self.positions, self.sequences)),
            *(_int_pointer(x) for x in (self.page_tables, self.lengths, self.output_rows, self.adapters)),
        )


@dataclass(frozen=True)
class OneRow:
    """Which products steps of one row take, and the median step of those that tried tiles and vectors in turn."""

    on_tiles: bool
    tiles_seconds: float
    vectors_seconds: float


class Program(_Object):
    """Operations over registers, replayed for batches. Keeps tensors, pool and cache alive.

    Raises:
        CoreError: the program is not well formed.
    """

    def __init__(
        self,
        pool: Pool,
        ops: Sequence[Op],
        tensors: Sequence[Tensor],
        registers: Sequence[Register],
        cache: Cache | None,
        *,
        max_rows: int,
        head_rows: int,
    ) -> None:
        self.ops = tuple(ops)
        self._alive = (pool, tuple(tensors), cache)
        c_ops = (COp * len(ops))(*(op.to_c() for op in ops))
        c_tensors = (CTensor * max(1, len(tensors)))(*(tensor.to_c() for tensor in tensors))
        kinds = get_args(RowKind)
        c_registers = (CRegister * len(registers))(*(CRegister(r.width, kinds.index(r.rows)) for r in registers))
        created = library().snello_program_create(
            pool.handle,
            c_ops,
            len(ops),
            c_tensors,
            len(tensors),
            c_registers,
            len(registers),
            cache.handle if cache else None,
            max_rows,
            head_rows,
        )
        super().__init__(created, library().snello_program_destroy)
        self.output_width = int(library().snello_program_output_width(self.handle))
        self.arena_bytes = int(library().snello_program_arena_bytes(self.handle))

    def step(self, batch: Batch) -> Floats:
        """Output rows (outputs, width).

        Raises:
            NotFinite: the activations of a row are not finite.
        """
        outputs = np.empty((len(batch.output_rows), self.output_width), np.float32)
        self._finite(library().snello_step(self.handle, c.byref(batch.to_c()), outputs.ctypes.data))
        return outputs

    def score(self, batch: Batch, targets: Ints) -> tuple[Floats, Ints]:
        """(log-probability of targets, most likely token), each (outputs,)."""
        targets = np.ascontiguousarray(targets, np.int32)
        assert targets.shape == batch.output_rows.shape
        scores, top1 = np.empty(len(targets), np.float32), np.empty(len(targets), np.int32)
        pointers = (targets.ctypes.data, scores.ctypes.data, top1.ctypes.data)
        self._finite(library().snello_score(self.handle, c.byref(batch.to_c()), *pointers))
        return scores, top1

    def one_row(self) -> OneRow | None:
        """How steps of one row are done; None where there are no tiles, or too few such steps until now."""
        seconds = np.zeros(2, np.float64)
        way = library().snello_one_row(self.handle, seconds.ctypes.data)
        check(way)
        return OneRow(way == ONE_ROW_ON_TILES, *seconds.tolist()) if way else None

    def profile(self, enable: bool) -> npt.NDArray[np.float64]:
        """Starts (True) or ends (False) timing; seconds of each op since it started."""
        seconds = np.zeros(len(self.ops), np.float64)
        check(library().snello_profile(self.handle, int(enable), seconds.ctypes.data))
        return seconds

    @staticmethod
    def _finite(status: int) -> None:
        check(status)
        if status > 0:
            raise NotFinite(status - 1)


# ---- the machine


def probe_bandwidth(pool: Pool, num_bytes: int, repeats: int) -> float:
    """GB/s (1e9 bytes) of reading `num_bytes` of resident memory with all threads, the best of `repeats`."""
    return _positive(library().snello_probe_bandwidth(pool.handle, num_bytes, repeats))


def probe_compute(pool: Pool, format: str, repeats: int) -> float:
    """1e9 operations a second of this format's inner loop on cached operands, all threads.

    Integers and BF16 are multiplied with rows of INT8 and BF16, FP32 and FP16 with rows of FP32.
    """
    return _positive(library().snello_probe_compute(pool.handle, FORMATS[format], repeats))


# ---- inside


def check(status: int) -> None:
    """Raises what the core said last, if it refused."""
    if status < 0:
        raise CoreError(last_error())


def _positive(value: float) -> float:
    if value <= 0:
        raise CoreError(last_error())
    return float(value)


def _created(handle: int | None) -> int:
    if not handle:
        raise CoreError(last_error())
    return handle


def _pointer(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)


def _int_pointer(array: Ints | None) -> int | None:
    assert array is None or (array.dtype == np.int32 and array.flags.c_contiguous), "batches are contiguous int32"
    return _pointer(array)


def _filled(values: Sequence[Any], length: int, filler: Any) -> list[Any]:
    assert len(values) <= length
    return [*values, *[filler] * (length - len(values))]
