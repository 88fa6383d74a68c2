"""Rounding a matrix to the integer formats of docs/numerics.md with the least squared error.

INT8: `w = r[n] * q`, r an FP16 value. INT4 and INT3, two-level: `w = r[n] * s[n, g] * q` with s in 1..15 and r of at
most seven significant bits, so that `r * s` is exact in FP16. Three bits have so few levels that the one more on the
negative side counts: there s also says on which side it is (-15..15). The pair is searched: the error of each group as
a function of its scale is sampled once, candidates of r are compared on those samples, then s is settled exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snello.techniques.quantize.basis import chunk_rows

INT8_LIMIT = 127

GRID_POINTS = 13
ROW_DIVISORS = torch.arange(8.0, 17.01, 0.25)  # candidates of r: the largest ideal scale over each of these
# Of a row's largest / 127: cutting off the largest pays where tails are heavy, and small steps do by luck, since levels
# that lie a little otherwise fit some rows better.
INT8_SHRINK = (*(1 - 0.005 * step for step in range(11)), 0.92, 0.88, 0.84, 0.8)


@dataclass(frozen=True)
class Grid:
    """The levels of a two-level format, and where its scales are searched.

    `signs` of s; `start` and `ratio` of the sampled scales of a group, in units of largest / -low; `center` and
    `offsets` of the candidates of s, in units of largest / (-low r).
    """

    bits: Literal[4, 3]
    signs: tuple[int, ...]
    start: float
    ratio: float
    center: float
    offsets: range

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def limits(self) -> tuple[int, int]:
        return self.low, self.high


INT4 = Grid(bits=4, signs=(1,), start=0.55, ratio=1.08, center=1.0, offsets=range(-5, 3))  # sampled 0.55 .. 1.39
INT3 = Grid(bits=3, signs=(1, -1), start=0.4, ratio=1.11, center=0.75, offsets=range(-5, 6))  # sampled 0.40 .. 1.40
GRIDS: dict[str, Grid] = {"int4": INT4, "int3": INT3}


@dataclass(frozen=True)
class Grouped:
    """`q` (N, K) INT8 within the grid's limits (stored minus `low`), `group_scale` (N, G), `row_scale` (N)."""

    q: Tensor
    group_scale: Tensor
    row_scale: Tensor
    group_size: int
    grid: Grid = INT4

    def values(self) -> Tensor:
        steps = self.row_scale[:, None] * self.group_scale
        return self.q * steps.repeat_interleave(self.group_size, dim=1)[:, : self.q.shape[1]]

    def in_groups(self, group_size: int) -> Grouped:
        """The same matrix, its one group of all columns told as groups of this size with equal scales."""
        assert self.group_scale.shape[1] == 1
        count = -(-self.q.shape[1] // group_size)
        return dataclasses.replace(self, group_scale=self.group_scale.repeat(1, count), group_size=group_size)


@dataclass(frozen=True)
class Int8:
    """`q` (N, K) INT8 in -127..127, `row_scale` (N)."""

    q: Tensor
    row_scale: Tensor

    def values(self) -> Tensor:
        return self.q * self.row_scale[:, None]


Rounded = TypeVar("Rounded", Grouped, Int8)


def join(parts: Sequence[Rounded]) -> Rounded:
    """Rows of one matrix that were rounded apart."""
    first = parts[0]
    whole: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name, value in vars(first).items()
        if isinstance(value, Tensor)
    }
    return dataclasses.replace(first, **whole)


def nearest(w: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Round half to even; a zero step (a row of zeros) gives zero."""
    return torch.where(step != 0, w / step, 0.0).round_().clamp_(low, high)


# ---- INT8 -----------------------------------------------------------------------------------------------------------


def int8_row_scale(w: Tensor) -> Tensor:
    """The FP16 value that loses least among a few shrinkings of largest / 127."""
    largest = w.abs().amax(1) / INT8_LIMIT
    candidates = torch.stack([_half(largest * shrink) for shrink in INT8_SHRINK])  # (C, N)
    errors = torch.stack([_int8_error(w, scale) for scale in candidates])
    return candidates.gather(0, errors.argmin(0)[None])[0]


def round_int8(w: Tensor) -> Int8:
    return join([_round_int8(part) for part in torch.split(w, chunk_rows(w))])


def static_step(largest: float) -> float:
    """The scale of 8-bit activations whose largest magnitude was seen before; later ones beyond it are cut to it."""
    step = float(np.float32(largest) / np.float32(INT8_LIMIT))
    return step if step > 0 else 1.0


def round_activations(x: Tensor, *, static: bool = False) -> Tensor:
    """What 8-bit activations make of these rows: one scale per row, largest / 127, or one for all if `static`."""
    scale = (x.abs().amax() if static else x.abs().amax(-1, keepdim=True)) / INT8_LIMIT
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round_().clamp_(-INT8_LIMIT, INT8_LIMIT) * scale


def _round_int8(w: Tensor) -> Int8:
    scale = int8_row_scale(w)
    return Int8(nearest(w, scale[:, None], -INT8_LIMIT, INT8_LIMIT).to(torch.int8), scale)


def _int8_error(w: Tensor, scale: Tensor) -> Tensor:
    q = nearest(w, scale[:, None], -INT8_LIMIT, INT8_LIMIT)
    return (w - q * scale[:, None]).square_().sum(1)


def _half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


# ---- INT4 and INT3 --------------------------------------------------------------------------------------------------


def round_grouped(w: Tensor, group_size: int, grid: Grid = INT4) -> Grouped:
    return on_grid(w, *grouped_scales(w, group_size, grid), group_size, grid)


def on_grid(w: Tensor, row_scale: Tensor, group_scale: Tensor, group_size: int, grid: Grid) -> Grouped:
    """Weights (N, K) rounded to nearest with these scales (N), (N, G)."""
    steps = (row_scale[:, None] * group_scale).repeat_interleave(group_size, dim=1)[:, : w.shape[1]]
    return Grouped(nearest(w, steps, *grid.limits).to(torch.int8), group_scale, row_scale, group_size, grid)


def grouped_scales(w: Tensor, group_size: int, grid: Grid = INT4) -> tuple[Tensor, Tensor]:
    """Row scales (N) and group scales (N, G) for these weights."""
    groups = F.pad(w, (0, -w.shape[1] % group_size)).reshape(len(w), -1, group_size)  # (N, G, g)
    parts = [_scales(part, grid) for part in torch.split(groups, chunk_rows(w))]
    return torch.cat([row for row, _ in parts]), torch.cat([group for _, group in parts])


def best_group_scale(groups: Tensor, row_scale: Tensor, grid: Grid = INT4) -> Tensor:
    """The s that loses least for each group, (N, G) of groups (N, G, g), given the rows' r."""
    step = torch.where(row_scale > 0, row_scale, 1.0)[:, None]
    center = (groups.abs().amax(-1) * (grid.center / -grid.low) / step).round()
    best = torch.ones_like(center)
    least = torch.full_like(center, float("inf"))
    for offset, sign in product(grid.offsets, grid.signs):
        scale = sign * (center + offset).clamp(1, 15)
        error = _error(groups, scale * row_scale[:, None], grid)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def seven_bits(x: Tensor) -> Tensor:
    """Rounded to seven significant bits, and to a multiple of FP16's smallest number; zero stays zero."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.ldexp((mantissa * 128).round() / 128, exponent)
    coarse = (x * 2.0**24).round().clamp(min=1) * 2.0**-24
    return torch.where(x == 0, x, torch.where(x < 2.0**-18, coarse, rounded))


def _scales(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    row_scale = _best_row_scale(groups, grid)
    return row_scale, best_group_scale(groups, row_scale, grid)


def _best_row_scale(groups: Tensor, grid: Grid) -> Tensor:
    unit = (groups.abs().amax(-1) / -grid.low).clamp(min=1e-30)  # (N, G)
    ratios = grid.start * grid.ratio ** torch.arange(GRID_POINTS, dtype=groups.dtype)
    curve = torch.stack([_least_error(groups, unit * ratio, grid) for ratio in ratios.tolist()], dim=-1)  # (N, G, J)
    energy = groups.square().sum(-1)
    ideal = unit * ratios[curve.argmin(-1)] * (energy > 0)
    largest = ideal.amax(1)  # (N)
    best, least = torch.zeros_like(largest), torch.full_like(largest, float("inf"))
    for divisor in ROW_DIVISORS.tolist():
        candidate = seven_bits(largest / divisor)
        low = (ideal / candidate.clamp(min=1e-30)[:, None]).floor().clamp(1, 15)
        steps = torch.stack((low, (low + 1).clamp(max=15))) * candidate[:, None]  # (2, N, G)
        error = torch.stack([_read(curve, energy, step / unit, grid) for step in steps]).amin(0).sum(1)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def _read(curve: Tensor, energy: Tensor, ratio: Tensor, grid: Grid) -> Tensor:
    """The sampled error curve at a scale between its samples; outside, what clipping or coarseness make of it."""
    place = torch.log(ratio.clamp(min=1e-9) / grid.start) / torch.log(torch.tensor(grid.ratio, dtype=ratio.dtype))
    low = place.floor().clamp(0, GRID_POINTS - 2).long()
    part = (place - low).clamp(0, 1)
    pair = curve.gather(-1, torch.stack((low, low + 1), dim=-1))
    inside = pair[..., 0] + (pair[..., 1] - pair[..., 0]) * part
    coarser = inside * (ratio / (grid.start * grid.ratio ** (GRID_POINTS - 1))).clamp(min=1).square()
    clipped = (1 - ratio / grid.start).clamp(min=0).square() * energy
    return torch.where(energy > 0, torch.minimum(coarser + clipped, energy), 0.0)  # a group of zeros loses nothing


def _least_error(groups: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Of either sign that the grid has."""
    return torch.stack([_error(groups, sign * step, grid) for sign in grid.signs]).amin(0)


def _error(groups: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Squared error (N, G) of groups (N, G, g) at these scales (N, G)."""
    step = step[..., None]
    return (nearest(groups, step, *grid.limits).mul_(step).sub_(groups)).square_().sum(-1)
