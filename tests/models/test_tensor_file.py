"""Reading a safetensors file: what the library writes is read to the bit, and every way to be broken has its line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snello.errors import SnelloError, Unsupported
from snello.models.tensor_file import open_tensor_file, release_pages

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_reads_what_the_library_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.randn(5, 7) * 3).to(dtype)
    save_file({"a": values, "scalar": values[0, 0].clone(), "empty": values[:0].clone()}, tmp_path / "x.safetensors")
    file = open_tensor_file(tmp_path / "x.safetensors")
    assert file.tensors["a"].shape == (5, 7) and file.tensors["scalar"].shape == ()
    assert file.tensors["empty"].float32().shape == (0, 7)
    np.testing.assert_array_equal(file.tensors["a"].float32(), values.float().numpy())
    np.testing.assert_array_equal(file.tensors["a"].rows(2, 4).float32(), values[2:4].float().numpy())


def test_released_pages_are_read_again_and_other_memory_stays(tmp_path: Path) -> None:
    values = torch.randn(512, 1024)
    save_file({"a": values, "b": values + 1}, tmp_path / "x.safetensors")
    for name, tensor in open_tensor_file(tmp_path / "x.safetensors").tensors.items():
        before = tensor.float32()
        assert resident_bytes(tensor.data) > 0.9 * tensor.data.size
        release_pages(tensor.data)
        assert resident_bytes(tensor.data) == 0
        np.testing.assert_array_equal(tensor.float32(), before)
        np.testing.assert_array_equal(before, (values + (name == "b")).numpy())
    own = np.arange(10_000, dtype=np.uint8)
    release_pages(own)
    release_pages(own[5000:])
    assert np.array_equal(own, np.arange(10_000, dtype=np.uint8))


def resident_bytes(data: np.ndarray) -> int:
    """Of the whole pages inside this memory that this process holds now."""
    first, end = -(-data.ctypes.data // 4096), (data.ctypes.data + data.size) // 4096
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
    return 4096 * int(np.count_nonzero(entries >> np.uint64(63)))


def test_is_a_view_that_cannot_be_written(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = open_tensor_file(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    with pytest.raises(ValueError, match="read-only"):
        file.tensors["a"].data[0] = 1


def test_names_a_number_type_that_it_cannot_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(Unsupported, match="F8_E4M3"):
        open_tensor_file(tmp_path / "x.safetensors").tensors["a"].float32()


def _write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


EIGHT = bytes(8)
_OVERLAPPING = _one(data_offsets=[4, 12])["a"]
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "needs 10 bytes, the file has 0"),
    "short": (lambda path: path.write_bytes(b"abc"), "needs 10 bytes, the file has 3"),
    "header longer than the file": (lambda path: _write(path, {}, length=500), "needs 508 bytes, the file has 10"),
    "absurd header": (lambda path: _write(path, {}, length=1 << 60), "header"),
    "not JSON": (lambda path: _write(path, b"{nonsense}"), "not JSON"),
    "not UTF-8": (lambda path: _write(path, b"\xff\xfe\xff\xfe"), "not JSON"),
    "not a table": (lambda path: _write(path, [1]), "not a table"),
    "metadata": (lambda path: _write(path, {"__metadata__": {"a": 1}}), "__metadata__"),
    "no offsets": (lambda path: _write(path, {"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "tensor a"),
    "unknown type": (lambda path: _write(path, _one(dtype="Q4"), EIGHT), "unknown number type Q4"),
    "a table as a type": (lambda path: _write(path, _one(dtype={}), EIGHT), "unknown number type {}"),
    "a number without end": (lambda path: _write(path, b'{"a": ' + b"1" * 5000 + b"}", EIGHT), "not JSON"),
    "sizes without end": (lambda path: _write(path, _one(shape=[10**4000] * 2), EIGHT), "shape .1000"),
    "negative shape": (lambda path: _write(path, _one(shape=[-2]), EIGHT), r"shape \[-2\]"),
    "true as a size": (lambda path: _write(path, _one(shape=[True, 2]), EIGHT), "shape"),
    "size": (lambda path: _write(path, _one(shape=[3]), EIGHT), r"has 8 bytes, F32 \[3\] needs 12"),
    "offsets backwards": (lambda path: _write(path, _one(data_offsets=[8, 0]), EIGHT), "needs 8"),
    "overlap": (lambda path: _write(path, {**_one(), "b": _OVERLAPPING}, bytes(12)), "b at 4 overlaps"),
    "hole": (lambda path: _write(path, _one(data_offsets=[4, 12]), bytes(12)), "a at 4 leaves a hole"),
    "truncated": (lambda path: _write(path, _one(), bytes(5)), r"describes \d+ bytes, the file has \d+"),
    "too long": (lambda path: _write(path, _one(), bytes(9)), r"describes \d+ bytes, the file has \d+"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(SnelloError, match=message) as caught:
        open_tensor_file(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message and caught.value.hint


def test_a_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnelloError, match=f"describes {whole:,} bytes, the file has {whole - 100:,}"):
        open_tensor_file(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="cannot read .*absent"):
        open_tensor_file(tmp_path / "absent")
