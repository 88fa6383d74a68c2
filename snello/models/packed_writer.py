"""Writing a packed file, tensor by tensor, so that no model has to fit in memory.

The data goes to `NAME.partial` beside the target, the header last; only a complete file is renamed into place. An
exception, a full disk or an interrupt leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError
from snello.models.model import FLOAT_FORMATS, StoredTensor
from snello.models.packed import (
    ALIGNMENT,
    FORMAT_VERSION,
    HEADER_ALIGNMENT,
    VECTOR,
    Layout,
    layouts,
    matrix_format,
    packed_bytes,
)
from snello.models.spec import BITS, FloatFormat, Spec
from snello.native import core

_ELSEWHERE = "{}choose another folder (--output, or SNELLO_CACHE for the cache)"
PIECE_BYTES = 1 << 25  # of FP32 values packed at a time
LEAST_HALF = (127 - 56) << 7  # the bits of 2^-56 in BF16


class PackedWriter:
    """Streams tensors into a packed file; use as a context manager.

    Names and shapes are those of `layouts(spec)`; each must be added once, in any order.

    Raises:
        SnelloError: the disk is too full or the folder cannot be written.
    """

    def __init__(self, path: Path, spec: Spec, metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._spec = spec
        self._layouts = layouts(spec)
        self._metadata = {**(metadata or {}), "format_version": FORMAT_VERSION, "spec": spec.digest}
        self._entries: dict[str, dict[str, Any]] = {}
        self._table: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._offset = 0
        named = sum(2 * len(name) + 400 for name in self._layouts)  # in `_entries` and in `_table`
        self._data_begin = -(-(named + 4096 + len(json.dumps(self._metadata))) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
        self._needed = self._data_begin + packed_bytes(spec)

    def __enter__(self) -> PackedWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < self._needed:
                raise disk_full(self.path, self._needed, free)
            self._file = self.partial.open("wb")
            self._file.seek(self._data_begin)
        except OSError as error:
            self._discard()
            raise cannot_write(self.path, error, self._needed) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            raise cannot_write(self.path, failure, self._needed) from None
        finally:
            self._discard()

    # ---- tensors

    def add_float(self, name: str, tensor: StoredTensor | npt.NDArray[Any], format: FloatFormat) -> None:
        """A matrix (N, K) of any float type, packed as `format`.

        What meets BF16 inputs has no values between 0 and 2^-56 (docs/numerics.md): they become 0.
        """
        layout = self._begin(name, format, tensor.shape)
        stored = tensor if isinstance(tensor, StoredTensor) else StoredTensor.of(tensor)
        if stored.dtype not in FLOAT_FORMATS:
            stored = StoredTensor.of(stored.float32())
        meets_bf16 = matrix_format(self._spec, name).activations == "bf16"
        packed = (core.pack_float(format, *_plain(stored.rows(a, b))) for a, b in self._pieces(layout))
        self._write(name, (_without_least(piece.data) if meets_bf16 else piece.data for piece in packed))

    def add_int8(self, name: str, q: npt.NDArray[np.int8], row_scale: npt.NDArray[np.float32]) -> None:
        """q (N, K or padded K) in -127..127, row_scale (N)."""
        layout = self._begin(name, "int8", q.shape)
        q = _widen(q, layout.columns, 0)
        self._write(name, (core.pack_int8(q[a:b], row_scale[a:b]).data for a, b in self._pieces(layout)))

    def add_grouped(
        self,
        name: str,
        format: str,
        q: npt.NDArray[np.uint8],
        group_scale: npt.NDArray[Any],
        row_scale: npt.NDArray[np.float32],
        group_size: int,
    ) -> None:
        """INT4: q (N, K or padded K) in 0..15, group_scale (N, groups) in 1..15; INT3: 0..7, -15..15 without 0. Also
        row_scale (N)."""
        layout = self._begin(name, format, q.shape, group_size)
        q = _widen(q, layout.columns, 2 ** (BITS[format] - 1))
        group_scale = _widen(group_scale, -(-layout.columns // group_size), 1)
        pieces = self._pieces(layout)
        parts = ((q[a:b], group_scale[a:b], row_scale[a:b]) for a, b in pieces)
        self._write(name, (core.pack_grouped(format, *part, group_size).data for part in parts))

    def add_packed(self, name: str, tensor: core.Tensor) -> None:
        """A matrix that is packed already, by panel or by channel; its bytes are copied."""
        layout = self._begin(name, tensor.format, (tensor.rows, tensor.columns), tensor.group_size)
        assert tensor.columns == layout.columns
        self._write(name, [tensor.data])

    def add_vector(self, name: str, values: npt.NDArray[Any]) -> None:
        """Plain FP32 values."""
        layout = self._begin(name, VECTOR, values.shape)
        raw = np.zeros(layout.num_bytes, np.uint8)
        plain = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        raw[: plain.size] = plain
        self._write(name, [raw])

    # ---- inside

    def _begin(self, name: str, format: str, shape: tuple[int, ...], group_size: int = 0) -> Layout:
        assert name in self._layouts, f"{name} is no tensor of this model"
        assert name not in self._entries, f"{name} is there already"
        layout = self._layouts[name]
        assert (format, group_size) == (layout.format, layout.group_size), f"{name}: {format} {group_size}, {layout}"
        fits = shape == layout.shape or (format != VECTOR and shape == (layout.shape[0], layout.columns))
        assert fits, f"{name} has shape {shape}, expected {layout.shape}"
        return layout

    def _pieces(self, layout: Layout) -> list[tuple[int, int]]:
        """Row ranges of whole panels: packed apart and put together they are the matrix packed at once."""
        rows, panel = layout.shape[0], core.PANEL_ROWS
        step = max(PIECE_BYTES // (4 * layout.columns) // panel, 1) * panel
        return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def _write(self, name: str, pieces: Any) -> None:
        assert self._file is not None, "use PackedWriter as a context manager"
        layout, checksum, begin = self._layouts[name], 0, self._offset
        try:
            for piece in pieces:
                checksum = zlib.crc32(piece, checksum)
                self._offset += self._file.write(piece)
        except OSError as error:
            raise cannot_write(self.path, error, self._needed) from None
        assert self._offset - begin == layout.num_bytes, f"{name}: {self._offset - begin} bytes, {layout.num_bytes}"
        assert begin % ALIGNMENT == 0
        self._entries[name] = {"dtype": "U8", "shape": [layout.num_bytes], "data_offsets": [begin, self._offset]}
        self._table[name] = {
            "format": layout.format,
            "shape": list(layout.shape),
            "group_size": layout.group_size,
            "crc32": f"{checksum:08x}",
        }

    def _finish(self) -> None:
        missing = [name for name in self._layouts if name not in self._entries]
        assert not missing, f"never added: {missing[:12]}"
        assert self._file is not None
        metadata = {**self._metadata, "tensors": json.dumps(self._table, separators=(",", ":"))}
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        room = self._data_begin - 8
        assert len(header) <= room, f"a header of {len(header)} bytes, {room} reserved"
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.partial.replace(self.path)

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk fails again on the buffered rest; the file goes anyway
                self._file.close()
            self._file = None
        with suppress(OSError):
            self.partial.unlink()


def disk_full(path: Path, needed: int, free: int) -> SnelloError:
    """Said before any work is done."""
    message = f"{path.parent} has {free / 1e9:.2f} GB free, {path.name} needs {needed / 1e9:.2f} GB"
    return SnelloError(message, _ELSEWHERE.format("free some space, or "))


def cannot_write(path: Path, error: OSError, needed: int | None = None) -> SnelloError:
    """A full disk, a read-only folder, ... as one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wants = f": {path.name} needs {needed / 1e9:.2f} GB" if needed else ""
        return SnelloError(f"the disk of {path.parent} is full{wants}", _ELSEWHERE.format("free some space, or "))
    return SnelloError(f"cannot write {path}: {error.strerror or error}", _ELSEWHERE.format(""))


def _plain(tensor: StoredTensor) -> tuple[npt.NDArray[Any], FloatFormat]:
    """The matrix as the core takes it: items of the stored size, aligned for them."""
    items = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.dtype]
    return np.require(tensor.data.view(items).reshape(tensor.shape), requirements=["C", "A"]), FLOAT_FORMATS[
        tensor.dtype
    ]


def _without_least(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Packed BF16, magnitudes below `LEAST_HALF` replaced by 0, in place."""
    bits = packed.view(np.uint16)
    bits[(bits & 0x7FFF) < LEAST_HALF] = 0
    return packed


def _widen(values: npt.NDArray[Any], columns: int, fill: int) -> npt.NDArray[Any]:
    missing = columns - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=fill) if missing else values
