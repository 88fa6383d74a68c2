"""Strict reading of one safetensors file through a memory map.

Everything that the header claims is checked before a byte of data is believed: the header's length, its JSON, known
number types, shape times size against the offsets, no overlap, no hole, and the file's true length. A file that
fails says what is wrong in one line. Nothing is copied.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from snello.errors import SnelloError
from snello.models.model import DTYPE_BYTES, Bytes, StoredTensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_INCOMPLETE = "download or copy the file again; it may be incomplete"


@dataclass(frozen=True)
class TensorFile:
    """One mapped file: its tensors by name, and the free-form metadata of its header."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def open_tensor_file(path: Path) -> TensorFile:
    """Checks and maps a safetensors file."""
    size = _file_size(path)
    header, data_begin = _read_header(path, size)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _refuse(path, "its __metadata__ is not a table of strings")
    entries = sorted((_entry(path, name, value) for name, value in header.items()), key=lambda entry: entry.begin)
    data_bytes = _check_offsets(path, entries)
    if data_begin + data_bytes != size:
        raise SnelloError(
            f"{path}: the header describes {data_begin + data_bytes:,} bytes, the file has {size:,}", _INCOMPLETE
        )
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    tensors = {
        entry.name: StoredTensor(entry.dtype, entry.shape, mapped[data_begin + entry.begin : data_begin + entry.end])
        for entry in entries
    }
    return TensorFile(path, metadata, tensors)


def release_pages(data: Bytes) -> None:
    """Gives back the resident pages of a mapped tensor; touched again they are read again. Other memory stays.

    Without it a walk through a model ends with the whole file resident, however little of it is in use at a time.
    """
    mapped: object = data
    start = data.ctypes.data
    while isinstance(mapped, np.ndarray):
        start, mapped = mapped.ctypes.data, mapped.base
    mapped = mapped.obj if isinstance(mapped, memoryview) else mapped
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = data.ctypes.data - start
    first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + data.size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise SnelloError(f"{path} is not a valid safetensors file: {reason}", _INCOMPLETE)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SnelloError(f"cannot read {path}: {error.strerror}", "is it there, and may you read it?") from None


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if size < 8 or length > size - 8 or length < 2:
                expected = 8 + max(length, 2) if length <= MAX_HEADER_BYTES else "no such"
                described = f"its header needs {expected} bytes, the file has {size:,}"
                _refuse(path, described)
            if length > MAX_HEADER_BYTES:
                _refuse(path, f"its header claims {length:,} bytes")
            raw = file.read(length)
    except OSError as error:
        raise SnelloError(f"cannot read {path}: {error.strerror}", "is it there, and may you read it?") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):  # a number of 5,000 digits among them
        _refuse(path, "its header is not JSON")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a table")
    return header, 8 + length


def _entry(path: Path, name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(path, f"tensor {name} has unknown number type {str(dtype)[:80]}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        _refuse(path, f"tensor {name} has shape {json.dumps(shape)[:80]} and offsets {json.dumps(offsets)[:80]}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        held = f"{offsets[1] - offsets[0]:,} bytes, {dtype} {shape} needs {expected:,}"
        _refuse(path, f"tensor {name} has {held}")
    return _Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_offsets(path: Path, entries: list[_Entry]) -> int:
    """Tensors lie back to back; returns the bytes they take."""
    end = 0
    for entry in entries:
        if entry.begin != end:
            fault = "overlaps another tensor" if entry.begin < end else "leaves a hole before it"
            _refuse(path, f"tensor {entry.name} at {entry.begin:,} {fault}")
        end = entry.end
    return end
