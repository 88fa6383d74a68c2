"""HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023): better scales, no text.

The error of a matrix is counted as the sum of |w - w'|^p with p < 1, which forgives a few large errors (clipped
outliers) for many small ones. Half-quadratic splitting makes it solvable: what is forgiven becomes a variable e of its
own, `|e|^p + b/2 (w - w' - e)^2`, whose e is a shrinkage of the error and whose scales are least squares on w - e. The
paper moves zero points; a symmetric format has none, so here the scales of docs/numerics.md move: each group's integer
s, then the row's r. Since both are rounded, a step is taken only where the error itself falls: it never rises, and the
result is never worse by it than round-to-nearest, where it starts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from snello.techniques.quantize.basis import chunk_rows
from snello.techniques.quantize.rounding import (
    INT4,
    Grid,
    Grouped,
    grouped_scales,
    nearest,
    on_grid,
    seven_bits,
)

POWER = 0.7
SHARPNESS, GROWTH = 10.0, 1.01  # b and its factor per round, as published; errors are in units of a row's mean step
ROUNDS = 20


def round_grouped_hqq(w: Tensor, group_size: int, grid: Grid = INT4) -> Grouped:
    """Weights (N, K) in the two-level format, with the scales that half-quadratic splitting finds."""
    row_scale, group_scale = grouped_scales(w, group_size, grid)
    groups = F.pad(w, (0, -w.shape[1] % group_size)).reshape(len(w), -1, group_size)  # (N, G, g)
    rows = chunk_rows(w)
    parts = [
        refine(*part, grid)
        for part in zip(
            torch.split(groups, rows), torch.split(row_scale, rows), torch.split(group_scale, rows), strict=True
        )
    ]
    row_scale, group_scale = torch.cat([r for r, _ in parts]), torch.cat([s for _, s in parts])
    return on_grid(w, row_scale, group_scale, group_size, grid)


def refine(groups: Tensor, row_scale: Tensor, group_scale: Tensor, grid: Grid = INT4) -> tuple[Tensor, Tensor]:
    """Better scales (N), (N, G) for groups (N, G, g) than those given; rows that no longer improve are left alone."""
    row_scale, group_scale = row_scale.clone(), group_scale.clone()
    moving, sharpness = torch.arange(len(groups)), SHARPNESS
    for _ in range(ROUNDS):
        if not len(moving):
            break
        before = row_scale[moving], group_scale[moving]
        after = improve(groups[moving], *before, sharpness, grid)
        row_scale[moving], group_scale[moving] = after
        moved = (after[0] != before[0]) | (after[1] != before[1]).any(1)
        moving, sharpness = moving[moved], sharpness * GROWTH
    return row_scale, group_scale


def improve(
    groups: Tensor, row_scale: Tensor, group_scale: Tensor, sharpness: float, grid: Grid = INT4
) -> tuple[Tensor, Tensor]:
    """One round: e, then every s, then e anew and every r; each scale stays where its step does not lower the error."""
    unit = mean_step(row_scale, group_scale)
    group_scale = _better_group_scale(groups, row_scale, group_scale, unit, sharpness, grid)
    return _better_row_scale(groups, row_scale, group_scale, unit, sharpness, grid), group_scale


def robust_error(groups: Tensor, step: Tensor, unit: Tensor, grid: Grid = INT4) -> Tensor:
    """Sum of |w - w'|^p (N, G) at these steps (N, G), w' the nearest there is, in units (N)."""
    return _errors(groups, step, unit, grid)[1].abs().pow_(POWER).sum(-1)


def mean_step(row_scale: Tensor, group_scale: Tensor) -> Tensor:
    return torch.where(row_scale > 0, row_scale * group_scale.abs().mean(1), 1.0)


def shrink(x: Tensor, sharpness: float) -> Tensor:
    """The e that makes `|e|^p + b/2 (x - e)^2` small: the paper's generalized soft threshold."""
    size = x.abs().clamp(min=1e-6)
    return x.sign() * (size - size.pow(POWER - 1) / sharpness).clamp(min=0)


def _better_group_scale(
    groups: Tensor, row_scale: Tensor, group_scale: Tensor, unit: Tensor, sharpness: float, grid: Grid
) -> Tensor:
    q, target = _split(groups, row_scale, group_scale, unit, sharpness, grid)
    size = _ratio((target * q).sum(-1), q.square().sum(-1) * row_scale[:, None]) * group_scale.sign()
    best = group_scale
    least = robust_error(groups, row_scale[:, None] * best, unit, grid)
    for candidate in (size.floor().clamp(1, 15) * group_scale.sign(), size.ceil().clamp(1, 15) * group_scale.sign()):
        error = robust_error(groups, row_scale[:, None] * candidate, unit, grid)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def _better_row_scale(
    groups: Tensor, row_scale: Tensor, group_scale: Tensor, unit: Tensor, sharpness: float, grid: Grid
) -> Tensor:
    q, target = _split(groups, row_scale, group_scale, unit, sharpness, grid)
    whole = q * group_scale[..., None]
    candidate = seven_bits(_ratio((target * whole).sum((1, 2)), whole.square().sum((1, 2))))
    before, after = (robust_error(groups, r[:, None] * group_scale, unit, grid).sum(1) for r in (row_scale, candidate))
    return torch.where((after < before) & (candidate > 0), candidate, row_scale)


def _split(
    groups: Tensor, row_scale: Tensor, group_scale: Tensor, unit: Tensor, sharpness: float, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The integers at these scales, and the weights without what is forgiven."""
    q, error = _errors(groups, row_scale[:, None] * group_scale, unit, grid)
    return q, groups - shrink(error, sharpness) * unit[:, None, None]


def _errors(groups: Tensor, step: Tensor, unit: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    q = nearest(groups, step[..., None], *grid.limits)
    return q, (groups - q * step[..., None]) / unit[:, None, None]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)
