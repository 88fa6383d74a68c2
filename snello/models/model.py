"""The `Model`: what a loaded checkpoint is to every other part.

It owns the types that stand between files and everybody who reads weights: a `StoredTensor` is bytes as a file holds
them, memory-mapped; `Weights` is the face that a plain checkpoint and a packed file share; a `Model` ties weights to a
`Spec`, a tokenizer and a history. Nothing here knows a family, a file format or a technique.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from snello.errors import Unsupported
from snello.models.spec import FloatFormat, Spec

if TYPE_CHECKING:
    from snello.models.tokenizer import Tokenizer

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Every number type that the safetensors format names, and its size. Only the float ones can be weights here; the others
# are read so that an error can name them.
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_FORMATS: dict[str, FloatFormat] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
FLOAT_DTYPES: dict[FloatFormat, str] = {value: key for key, value in FLOAT_FORMATS.items()}
_NUMPY: dict[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file holds it: read-only bytes, usually a view of a memory map."""

    dtype: str  # safetensors names: "F32", "BF16", ...
    shape: tuple[int, ...]
    data: Bytes  # 1-D, row-major

    def load(self) -> StoredTensor:
        """Itself: other things that stand for a tensor are computed or cut out first."""
        return self

    def float32(self) -> Floats:
        """A fresh FP32 array with the same values (F64 narrows)."""
        if self.dtype == "BF16":
            halves = self.data.view(np.uint16).astype(np.uint32)
            return (halves << np.uint32(16)).view(np.float32).reshape(self.shape)
        if self.dtype not in _NUMPY:
            raise Unsupported(f"cannot read numbers of type {self.dtype}", "convert the checkpoint to BF16 or FP32")
        return self.data.view(_NUMPY[self.dtype]).astype(np.float32).reshape(self.shape)

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Rows `begin..end` of the first dimension, without a copy."""
        assert 0 <= begin <= end <= self.shape[0]
        row_bytes = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        return StoredTensor(self.dtype, (end - begin, *self.shape[1:]), self.data[begin * row_bytes : end * row_bytes])

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> StoredTensor:
        """An FP32 or FP16 array in memory, as if a file had held it."""
        dtype = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}[values.dtype]
        contiguous = np.ascontiguousarray(values)
        return cls(dtype, values.shape, contiguous.reshape(-1).view(np.uint8))


class Loadable(Protocol):
    """What stands for a tensor of a file: nothing is read or computed before `load`."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def load(self) -> StoredTensor: ...


class Weights(Protocol):
    """Parameters by canonical name (`spec.py`), whatever holds them."""

    def names(self) -> list[str]:
        """Canonical parameter names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The true shape, without padding."""

    def values(self, name: str) -> Floats:
        """Effective values in the plain basis, a fresh FP32 array: dequantized, un-rotated, un-equalized."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model: what it is (`spec`), its weights (read when asked for), and where it came from.

    `generation` is generation_config.json as found. `history` has one entry per step that was applied. `files` are the
    files that hold the weights; the digest is taken over them. `note` is what a person should know of how it was read;
    `grid` the group size of the symmetric four-bit integers that the weights were read from, 0 if there were none.
    `draft` is the folder of a lean model that was put beside it to guess what it says (`pair.py`).
    """

    spec: Spec
    weights: Weights
    path: Path
    name: str
    generation: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    files: tuple[Path, ...] = ()
    note: str = ""
    grid: int = 0
    draft: Path | None = None

    @property
    def home(self) -> Path:
        """What to `load` to have all of it: the folder of both where a draft stands beside it."""
        return self.path if self.draft is None else self.draft.parent

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer; a clear error if it has none."""
        from snello.models.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(self.weights.shape(name)) for name in self.weights.names())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the spec and the weights. Reads every file once, so it is computed when asked for."""
        total = hashlib.sha256(self.spec.digest.encode())
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        if not self.files:
            for name in sorted(self.weights.names()):
                total.update(name.encode() + self.weights.values(name).tobytes())
        return total.hexdigest()
