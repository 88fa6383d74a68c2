"""How a checkpoint lays out a parameter that is not simply a tensor of its own.

Several may be stacked in one tensor, row after row or head by head (GPT-NeoX), all experts of a layer may be one
tensor of three dimensions, and a matrix may be stored as (inputs, outputs) (GPT-2). Reading takes one parameter out,
when it is asked for; writing puts all of them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snello.models.model import DTYPE_BYTES, Floats, Loadable, StoredTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """`runs`: the parts alternate so many times (q, k, v of the first head, then of the second, ...).

    `depthwise`: a matrix (K, D) is stored as the weight of a convolution by channel, (D, 1, K).
    `experts`: the tensor is (experts, rows, columns) and the parts are all of theirs, one expert after the other; 0: a
    matrix or vector.
    """

    transposed: bool = False
    runs: int = 1
    experts: int = 0
    depthwise: bool = False


PLAIN = Arrangement()


@dataclass(frozen=True)
class Piece:
    """One of the parts of a stored tensor. Nothing is read or copied before `load`."""

    tensor: Loadable
    heights: tuple[int, ...]  # rows of each part
    index: int
    arrangement: Arrangement

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> Shape:
        if self.arrangement.experts:
            return self.heights[self.index], self.tensor.shape[2]
        if self.arrangement.depthwise:
            return self.heights[self.index], self.tensor.shape[0]
        rest = self.tensor.shape[:-1] if self.arrangement.transposed else self.tensor.shape[1:]
        return self.heights[self.index], *rest

    def load(self) -> StoredTensor:
        """Its rows, row-major: a view where the file has them so, else a copy of this part alone."""
        begin, tensor = sum(self.heights[: self.index]), self.tensor.load()
        if self.arrangement == PLAIN:
            return tensor.rows(begin, begin + self.heights[self.index])
        if self.arrangement.experts:
            matrix = StoredTensor(self.dtype, (sum(self.heights), tensor.shape[2]), tensor.data)
            return matrix.rows(begin, begin + self.heights[self.index])
        runs = self.arrangement.runs
        numbers = tensor.data.view(f"u{DTYPE_BYTES[self.dtype]}").reshape(tensor.shape)
        if self.arrangement.depthwise:
            numbers = numbers[:, 0]  # (D, K)
        rows = numbers.T if self.arrangement.transposed or self.arrangement.depthwise else numbers
        dealt = rows.reshape(runs, sum(self.heights) // runs, *rows.shape[1:])
        part = dealt[:, begin // runs : (begin + self.heights[self.index]) // runs]
        return StoredTensor(self.dtype, self.shape, np.ascontiguousarray(part).reshape(-1).view(np.uint8))


def stored_shape(shapes: Sequence[Shape], arrangement: Arrangement) -> Shape:
    """The shape of the tensor that holds parts of these shapes."""
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if arrangement.experts:
        return arrangement.experts, shape[0] // arrangement.experts, *shape[1:]
    if arrangement.depthwise:
        return shape[1], 1, shape[0]
    return shape[::-1] if arrangement.transposed else shape


def join(parts: Sequence[Floats], arrangement: Arrangement) -> Floats:
    """The inverse of taking pieces out: the tensor that holds these parts."""
    rest = parts[0].shape[1:]
    if arrangement.experts:
        return np.concatenate(parts).reshape(arrangement.experts, -1, *rest)
    if arrangement.depthwise:
        return np.ascontiguousarray(parts[0].T[:, None])
    dealt = [part.reshape(arrangement.runs, -1, *rest) for part in parts]
    rows = np.concatenate(dealt, axis=1).reshape(-1, *rest) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(rows.T) if arrangement.transposed else rows
