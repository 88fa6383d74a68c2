"""The basis in which a linear's weights are rounded: channels scaled (equalize), then mixed by Hadamard (rotate).

Stored weights are `W diag(s) H / sqrt(b)`, the input becomes `H (x / s) / sqrt(b)`: their product is unchanged, but no
channel stands out any more, so one scale per row fits all. Scales are not rounded to powers of two: division would be
exact, but channels left unequal raise the squared error by a sixth, in the worst case by a half. Columns are padded
with zeros to a multiple of 64 first; H is block-diagonal with blocks of b = 128, or 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

PASSES = 3
CHUNK_WEIGHTS = 1 << 22  # rows are treated in chunks of about this many weights, which bounds temporary memory
RANGE = 2.0**-20  # channels weaker than this, relative to the strongest, are scaled as if they had it


@dataclass(frozen=True)
class Basis:
    """`scale` (K) or None: not equalized."""

    columns: int
    scale: Tensor | None
    rotated: bool

    @cached_property
    def padded(self) -> int:
        return -(-self.columns // 64) * 64

    @cached_property
    def padded_scale(self) -> Tensor | None:
        return None if self.scale is None else torch.nn.functional.pad(self.scale, (0, self._missing), value=1.0)

    def weights(self, w: Tensor) -> Tensor:
        """(N, K) -> (N, padded)."""
        return self._rotate(self._pad(w if self.scale is None else w * self.scale))

    def inputs(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., padded)."""
        return self._rotate(self._pad(x if self.scale is None else x / self.scale))

    def plain_weights(self, w: Tensor) -> Tensor:
        """The inverse of `weights`: the effective matrix, (N, padded) -> (N, K)."""
        w = self._rotate(w)[..., : self.columns]
        return w if self.scale is None else w / self.scale

    def plain_inputs(self, x: Tensor) -> Tensor:
        """The inverse of `inputs`."""
        x = self._rotate(x)[..., : self.columns]
        return x if self.scale is None else x * self.scale

    def gram(self, gram: Tensor) -> Tensor:
        """X^T X of plain inputs -> of inputs in this basis, (K, K) -> (padded, padded)."""
        return self.inputs(self.inputs(gram).T)

    @property
    def _missing(self) -> int:
        return self.padded - self.columns

    def _pad(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, self._missing)) if self._missing else x

    def _rotate(self, x: Tensor) -> Tensor:
        if not self.rotated:
            return x
        block = 128 if self.padded % 128 == 0 else 64
        return (x.reshape(-1, block) @ hadamard(block).to(x.dtype)).reshape(x.shape)


@lru_cache
@torch.inference_mode(False)
def hadamard(block: int) -> Tensor:
    """Sylvester's matrix, orthonormal; symmetric, so its own inverse."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(block)


def balanced_scale(loudness: Tensor, consumers: Sequence[Tensor]) -> Tensor:
    """sqrt(x / w), x the loudness of each input channel (K), w the RMS of the weights that read it.

    Rounding noise of a rotated block is sum (w s)^2 times sum (x / s)^2; by Cauchy and Schwarz this s makes it least.
    """
    return (away_from_zero(loudness) / column_rms(consumers)).sqrt()


def chunk_rows(w: Tensor) -> int:
    return max(1, CHUNK_WEIGHTS // w.shape[1])


def away_from_zero(loudness: Tensor) -> Tensor:
    return loudness.clamp(min=max(loudness.max().item() * RANGE, 1e-30))


def column_rms(consumers: Sequence[Tensor]) -> Tensor:
    """RMS of each channel (K) over all rows, kept away from zero, up to a common factor.

    Rows count alike, since each has a scale of its own; how loud a row is, is judged with its channels made equal. That
    is a fixed point (Sinkhorn's), near after a few passes.
    """
    rms = torch.ones(consumers[0].shape[1], dtype=consumers[0].dtype)
    for _ in range(PASSES):
        energy = torch.zeros_like(rms)
        for part in (part for w in consumers for part in torch.split(w, chunk_rows(w))):
            loudness = (part / rms).square().mean(1, keepdim=True)
            energy += torch.where(loudness > 0, part.square() / loudness, 0.0).sum(0)
        rms = away_from_zero((energy / sum(len(w) for w in consumers)).sqrt())
    return rms
