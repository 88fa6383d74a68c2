"""Inputs that skip small values, in the reference: dense products of masked rows (docs/numerics.md, Skip).

What is small is judged in the basis in which the input is quantized, so a row goes there, loses what is below its
channel's threshold, and comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from snello.models.packed import PackedWeights, hadamard, padded, rotate_block
from snello.models.reference_layers import Block, ExpertsHalf
from snello.models.spec import Spec, input_name

if TYPE_CHECKING:
    from snello.models.model import Weights


@dataclass(frozen=True)
class InputBasis:
    """Where an input of `columns` values is quantized: divided by `scale` (padded K), rotated in blocks."""

    columns: int
    scale: Tensor | None
    rotated: bool

    def enter(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., padded K)."""
        x = F.pad(x, (0, padded(self.columns) - self.columns))
        return self._rotate(x if self.scale is None else x / self.scale)

    def leave(self, x: Tensor) -> Tensor:
        """The inverse."""
        x = self._rotate(x)
        return (x if self.scale is None else x * self.scale)[..., : self.columns]

    def _rotate(self, x: Tensor) -> Tensor:
        if not self.rotated:
            return x
        block = rotate_block(self.columns)
        return (x.reshape(-1, block) @ torch.from_numpy(hadamard(block)).to(x.dtype)).reshape(x.shape)


@dataclass(frozen=True)
class Skip:
    """Rows (..., K) without their small values; `threshold` (padded K)."""

    basis: InputBasis
    threshold: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        y = self.basis.enter(x.float())
        return self.basis.leave(torch.where(y.abs() < self.threshold, 0.0, y)).to(x.dtype)


def basis_of(spec: Spec, weights: PackedWeights, linear: str) -> InputBasis:
    """The basis of the input that this linear reads."""
    form, scale = spec.format(linear), weights.input_scale(input_name(linear))
    columns = weights.shape(f"{linear}.weight")[1]
    return InputBasis(
        columns, torch.from_numpy(scale.copy()) if scale is not None and form.equalize else None, form.rotate
    )


def add_skips(block: Block, index: int, spec: Spec, weights: Weights) -> None:
    """Gives the halves of a block what its formats say. Experts never skip: the core stores none of them by channel."""
    for name, half in (("attention", block.attention), ("ffn", block.ffn)):
        if isinstance(half, ExpertsHalf):
            continue
        for place, part in (("inputs", half.inputs[0]), ("output", half.output)):
            linear = f"layers.{index}.{name}.{part}"
            if spec.format(linear).skip:
                assert isinstance(weights, PackedWeights), "thresholds are stored in packed files"
                threshold = weights.input_threshold(input_name(linear))
                assert threshold is not None
                half.skips[place] = Skip(basis_of(spec, weights, linear), torch.from_numpy(threshold.copy()))
