"""One matrix of somebody's integers: `w[n, k] = (q[n, k] - z[n, g(k)]) * s[n, g(k)]`, in whatever layout they lie.

The layouts differ in who is packed along what; what they mean is the same, and is computed here alone. The product is
exact in FP32 (a scale of at most eleven bits times a difference of at most nine) and is rounded once, to the number
type of the checkpoint: bit for bit what an engine gets that multiplies in that type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from snello.models.model import FLOAT_FORMATS, StoredTensor
from snello.models.tensor_writer import narrow

Integers = npt.NDArray[np.int16]
Words = npt.NDArray[np.uint32]
CHUNK_ROWS = 1024  # rows dequantized at a time: the FP32 product of a whole matrix is never held


@dataclass(frozen=True)
class Parts:
    """`q` (N, K); `zeros` and `scales` (N, G) or zeros None: symmetric; `groups` (K): each column's group."""

    q: Integers
    scales: npt.NDArray[np.float32]
    zeros: Integers | None
    groups: npt.NDArray[np.intp]

    def rows(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Values of some rows, exact in FP32."""
        q = self.q[begin:end]
        difference = q if self.zeros is None else q - self.zeros[begin:end][:, self.groups]
        values: npt.NDArray[np.float32] = difference.astype(np.float32) * self.scales[begin:end][:, self.groups]
        return values


@dataclass(frozen=True)
class Matrix:
    """A float matrix that is computed from integers when it is asked for. It stands where a `StoredTensor` stands."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Parts]

    def load(self) -> StoredTensor:
        """The matrix in its number type, rounded once."""
        parts, kind = self.parts(), FLOAT_FORMATS[self.dtype]
        starts = range(0, self.shape[0], CHUNK_ROWS)
        pieces = [narrow(self.name, parts.rows(start, start + CHUNK_ROWS), kind) for start in starts]
        return StoredTensor(self.dtype, self.shape, np.concatenate(pieces).reshape(-1).view(np.uint8))


@dataclass(frozen=True)
class Expanded:
    """`tensors` by stored name; `spare` are tensors that say nothing; `note` what a person should know.

    `grid`: the group size of four-bit integers around one middle, a grid that our INT4 can find again; 0: none such.
    """

    tensors: dict[str, Any]  # StoredTensor | Matrix
    spare: frozenset[str] = frozenset()
    note: str = ""
    grid: int = 0
    faults: list[str] = field(default_factory=list)


def unpack(words: npt.NDArray[Any], bits: int) -> Integers:
    """Fields of 32-bit words along the last axis, least significant first: (..., W) -> (..., W * 32 / bits)."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.reshape(*words.shape[:-1], -1).astype(np.int16)


def words_of(tensor: StoredTensor) -> Words:
    """The 32-bit words of an I32 tensor."""
    return np.require(tensor.data, requirements=["C", "A"]).view("<u4").reshape(tensor.shape)


def spread(columns: int, group_size: int) -> npt.NDArray[np.intp]:
    """The group of each column where groups lie side by side."""
    return np.arange(columns) // group_size


def num_groups(columns: int, group_size: int) -> int:
    return -(-columns // group_size)


def grid_of(bits: int, symmetric: bool, group_size: int) -> int:
    """`Expanded.grid` of these settings."""
    return group_size if bits == 4 and symmetric and group_size in (32, 64, 128) else 0


def float_dtype(stated: str | None, scales: StoredTensor) -> str:
    """The type that the weights are read in: what config.json says, else the scales' own."""
    return stated or (scales.dtype if scales.dtype in FLOAT_FORMATS else "F32")


def misfit(name: str, tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """A fault if this tensor is not of such a type and shape."""
    if tensor.dtype not in dtypes:
        return [f"{name} holds {tensor.dtype} numbers, expected {' or '.join(dtypes)}"]
    return [f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"] if tensor.shape != shape else []
