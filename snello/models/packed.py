"""The packed file: every matrix in the layout that the core reads, in a valid safetensors file (docs/numerics.md,
Files).

Tensors are U8 rows of packed bytes; the header's metadata says for each its format, true shape, group size and
CRC-32. Data begins at a 64 KiB boundary and every tensor at a multiple of 64, so a map of the file is used as it
is: opening costs no reading.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from snello.errors import SnelloError
from snello.models.model import Floats, StoredTensor
from snello.models.parameters import matrix_names, parameter_shapes
from snello.models.spec import Format, Spec, input_name, linear_names, read_share
from snello.models.tensor_file import open_tensor_file, release_pages
from snello.native import core

FORMAT_VERSION = "2.0"
HEADER_ALIGNMENT = 1 << 16
ALIGNMENT = 64
VECTOR = "vector"  # plain FP32 values, not packed


@dataclass(frozen=True)
class Layout:
    """What one tensor of a packed file must look like."""

    format: str  # of the core, or "vector"
    shape: tuple[int, ...]  # true, unpadded
    group_size: int = 0

    @property
    def columns(self) -> int:
        """Columns as packed: integer matrices are padded to blocks of 64."""
        return padded(self.shape[1]) if self.format.startswith("int") else self.shape[1]

    @property
    def num_bytes(self) -> int:
        if self.format == VECTOR:
            return _up(4 * int(np.prod(self.shape)), ALIGNMENT)
        return _up(core.packed_bytes(self.format, self.shape[0], self.columns, self.group_size), ALIGNMENT)


def padded(columns: int) -> int:
    return _up(columns, core.BLOCK_COLUMNS)


def rotate_block(columns: int) -> int:
    """The Hadamard block of an input: 128 where that divides the padded width, else 64."""
    return 128 if padded(columns) % 128 == 0 else 64


def matrix_format(spec: Spec, name: str) -> Format:
    """The format of a matrix by its parameter name."""
    if name == "embedding.tokens.weight":
        return spec.format("head" if spec.head.tied else "embedding")
    return spec.default_format if name.startswith("embedding.") else spec.format(name.removesuffix(".weight"))


def stored_format(form: Format) -> str:
    """The core's name of how these weights are stored."""
    return form.weights + core.CHANNELS if form.skip else form.weights


def layouts(spec: Spec) -> dict[str, Layout]:
    """Every tensor of this model's packed file: parameters, then what belongs to inputs.

    "inputs.<input>.scale" and "inputs.<input>.threshold" per column; "inputs.<input>.step", one value: the scale of
    INT8 activations that are static.
    """
    matrices, found = set(matrix_names(spec)), dict[str, Layout]()
    for name, shape in parameter_shapes(spec).items():
        fmt = matrix_format(spec, name) if name in matrices else None
        found[name] = Layout(stored_format(fmt), shape, fmt.group_size) if fmt else Layout(VECTOR, shape)
    shapes = parameter_shapes(spec)
    for linear in linear_names(spec):
        columns = padded(shapes[_matrix_of(spec, linear)][1])
        if spec.format(linear).equalize:
            found[f"inputs.{input_name(linear)}.scale"] = Layout(VECTOR, (columns,))
        if spec.format(linear).skip:
            found[f"inputs.{input_name(linear)}.threshold"] = Layout(VECTOR, (columns,))
        if spec.format(linear).activations == "int8-static":
            found[f"inputs.{input_name(linear)}.step"] = Layout(VECTOR, (1,))
    return found


def packed_bytes(spec: Spec) -> int:
    """Bytes of data of the packed file."""
    return sum(layout.num_bytes for layout in layouts(spec).values())


def channel_bytes(layout: Layout) -> int:
    """What the channels of a matrix take that is stored by channel: all but its scales."""
    panel = core.PANEL_ROWS * 8
    rows = _up(layout.shape[0], panel if layout.format.startswith("int4") else panel // 2)
    return rows * layout.columns // (2 if layout.format.startswith("int4") else 1)


class PackedWeights:
    """A packed file, mapped. Matrices go to the core as they lie; `values` undoes the packing for everybody else.

    Raises:
        SnelloError: the file is damaged, of another major version, or does not belong to this `Spec`.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        self.path, self.spec = path, spec
        file = open_tensor_file(path)
        _check_version(path, file.metadata)
        self.layouts = layouts(spec)
        self._stored = file.tensors
        self._checksums = _checksums(path, file.metadata, self.layouts, file.tensors)

    # ---- Weights

    def names(self) -> list[str]:
        return [name for name in self.layouts if not name.startswith("inputs.")]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layouts[name].shape

    def values(self, name: str) -> Floats:
        """Effective FP32 values in the plain basis: W = (W' H) / (input scale * sqrt(block))."""
        if self.layouts[name].format == VECTOR:
            return self.vector(name).copy()
        rows, columns = self.layouts[name].shape
        tensor = self.tensor(name)
        values = core.unpack(tensor).values  # (N, padded K)
        release_pages(tensor.data)
        fmt = matrix_format(self.spec, name)
        if fmt.rotate:
            block = rotate_block(columns)
            values = (values.reshape(-1, block) @ hadamard(block)).reshape(rows, -1)
        if fmt.equalize:
            scale = self.input_scale(input_name(self._linear(name)))
            assert scale is not None
            values /= scale
        plain: Floats = np.ascontiguousarray(values[:, :columns])
        return plain

    # ---- for the engine

    def tensor(self, name: str) -> core.Tensor:
        """A packed matrix as the core takes it."""
        layout = self.layouts[name]
        assert layout.format != VECTOR, f"{name} is a vector"
        return core.Tensor(
            data=self._stored[name].data,
            format=layout.format,
            rows=layout.shape[0],
            columns=layout.columns,
            group_size=layout.group_size,
        )

    def vector(self, name: str) -> Floats:
        """A plain FP32 tensor, a view of the file."""
        layout = self.layouts[name]
        assert layout.format == VECTOR, f"{name} is a matrix"
        values: Floats = self._stored[name].data.view(np.float32)[: int(np.prod(layout.shape))].reshape(layout.shape)
        return values

    def input_scale(self, input_name: str) -> Floats | None:
        """By how much the weights of this input's linears were multiplied, per padded column; None: not at all."""
        name = f"inputs.{input_name}.scale"
        return self.vector(name) if name in self.layouts else None

    def input_threshold(self, input_name: str) -> Floats | None:
        """Below what magnitude, per padded column, this input's values are 0; None: they stay as they are."""
        name = f"inputs.{input_name}.threshold"
        return self.vector(name) if name in self.layouts else None

    def input_step(self, input_name: str) -> float:
        """The scale of this input's INT8 activations; 0: every row has its own."""
        name = f"inputs.{input_name}.step"
        return float(self.vector(name)[0]) if name in self.layouts else 0.0

    @property
    def total_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self.layouts.values())

    @cached_property
    def linear_bytes(self) -> int:
        """Bytes of all linears that one decoded token reads: not of channels that its inputs skip, nor of experts that
        it does not go to, and of an untied embedding one row.
        """
        return round(sum(self._read_bytes(linear) for linear in linear_names(self.spec)))

    def _read_bytes(self, linear: str) -> float:
        layout, skip = self.layouts[_matrix_of(self.spec, linear)], self.spec.format(linear).skip
        return (layout.num_bytes - int(skip * channel_bytes(layout))) * read_share(self.spec, linear)

    def verify(self) -> None:
        """Reads the whole file once and compares checksums."""
        damaged = [name for name, crc in self._checksums.items() if zlib.crc32(self._stored[name].data.data) != crc]
        if damaged:
            named = ", ".join(damaged[:12])
            raise SnelloError(
                f"{self.path}: {len(damaged)} tensors are damaged: {named}", "make or copy the file again"
            )

    def _linear(self, name: str) -> str:
        return "head" if name == "embedding.tokens.weight" else name.removesuffix(".weight")


def hadamard(block: int) -> Floats:
    """Sylvester's matrix of order `block` over sqrt(block): symmetric and its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normalized: Floats = matrix / np.sqrt(np.float32(block))
    return normalized


def _matrix_of(spec: Spec, linear: str) -> str:
    tied = linear == "head" and spec.head.kind == "lm" and spec.head.tied
    return "embedding.tokens.weight" if tied else f"{linear}.weight"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version")
    if version is None or "tensors" not in metadata:
        raise SnelloError(f"{path} is not a packed snello file", "give the folder that snello wrote")
    if version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        hint = "make it again from the original, or install the version of snello that made it"
        raise SnelloError(f"{path} has format version {version}, this snello reads {FORMAT_VERSION}", hint)


def _checksums(
    path: Path, metadata: Mapping[str, str], expected: Mapping[str, Layout], stored: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """CRC-32 by name, after checking that the file holds exactly the expected tensors."""
    try:
        entries = json.loads(metadata["tensors"])
        found = {name: _layout(entry) for name, entry in entries.items()}
        checksums = {name: int(entry["crc32"], 16) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnelloError(f"{path}: its table of tensors is broken: {error!r}", "make or copy the file again") from None
    faults = [f"missing {name}" for name in expected if name not in found or name not in stored]
    faults += [f"unexpected {name}" for name in (found.keys() | stored.keys()) if name not in expected]
    faults += [
        f"{name} is {found[name]}, expected {layout}"
        for name, layout in expected.items()
        if name in found and found[name] != layout
    ]
    faults += [f"{name} {fault}" for name, layout in expected.items() if (fault := _fault(stored.get(name), layout))]
    if faults:
        listed = "; ".join(faults[:12]) + (f" and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise SnelloError(f"{path} does not fit its model in {len(faults)} places: {listed}", "make the folder again")
    return checksums


def _layout(entry: Mapping[str, object]) -> Layout:
    shape = entry["shape"]
    if not isinstance(shape, list):
        raise TypeError(f"shape {shape}")
    return Layout(str(entry["format"]), tuple(shape), int(str(entry["group_size"])))


def _fault(tensor: StoredTensor | None, layout: Layout) -> str | None:
    if tensor is None:
        return None
    if tensor.dtype != "U8" or tensor.data.size != layout.num_bytes:
        return f"has {tensor.data.size:,} bytes of {tensor.dtype}, expected {layout.num_bytes:,} of U8"
    return "is not aligned to 64 bytes" if tensor.data.ctypes.data % ALIGNMENT else None
