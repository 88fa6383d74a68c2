"""Rounding to the integer formats: the format's own rules, and how much the two-level scale costs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snello.techniques.quantize.rounding import (
    INT3,
    INT4,
    Grid,
    best_group_scale,
    grouped_scales,
    round_activations,
    round_grouped,
    round_int8,
    seven_bits,
)


def weights(kind: str, rows: int = 96, columns: int = 512, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(rows, columns) * 0.02
    if kind == "laplace":
        return torch.distributions.Laplace(0.0, 0.01).sample((rows, columns))
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02


GRIDS = {"int4": INT4, "int3": INT3}


def fp16_group_error(w: Tensor, group_size: int, grid: Grid) -> float:
    """Squared error of round-to-nearest with the best FP16 scale per group out of 60, of either sign where the format
    has signs: the plain format."""
    groups = w.unflatten(1, (-1, group_size))
    best = torch.full(groups.shape[:2], float("inf"))
    for shrink in (sign * size for size in np.arange(0.3, 1.6, 0.02) for sign in grid.signs):
        step = (groups.abs().amax(-1) / -grid.low * shrink).half().float()[..., None]
        error = ((groups / step).round().clamp(*grid.limits) * step - groups).square().sum(-1)
        best = torch.minimum(best, error)
    return float(best.sum())


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student"])
@pytest.mark.parametrize(("group_size", "allowed"), [(128, 1.02), (64, 1.03), (32, 1.05)])
@pytest.mark.parametrize("grid", GRIDS)
def test_two_levels_cost_little(grid: str, kind: str, group_size: int, allowed: float) -> None:
    w = weights(kind)
    error = float((round_grouped(w, group_size, GRIDS[grid]).values() - w).square().sum())
    assert (error / fp16_group_error(w, group_size, GRIDS[grid])) ** 0.5 < allowed


def test_three_bits_choose_the_side_that_has_one_level_more() -> None:
    w = weights("gaussian", 64, 1024)
    signed, unsigned = (round_grouped(w, 64, grid) for grid in (INT3, dataclasses.replace(INT3, signs=(1,))))
    assert (signed.group_scale < 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (signed.values() - w).norm() < 0.96 * (unsigned.values() - w).norm()
    mirrored = round_grouped(-w, 64, INT3)
    assert torch.equal(mirrored.row_scale, signed.row_scale) and torch.equal(mirrored.values(), -signed.values())


def fits_the_format(matrix_q: Tensor, group_scale: Tensor, row_scale: Tensor, grid: Grid = INT4) -> None:
    assert matrix_q.min() >= grid.low and matrix_q.max() <= grid.high and matrix_q.dtype == torch.int8
    size = group_scale.abs() if len(grid.signs) == 2 else group_scale
    assert size.min() >= 1 and size.max() <= 15 and torch.equal(size, size.round())
    assert torch.equal(seven_bits(row_scale), row_scale) and (row_scale >= 0).all()
    steps = row_scale[:, None] * group_scale
    assert torch.equal(steps.half().float(), steps)


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.integers(-18, 6),
    rows=st.integers(1, 5),
    columns=st.sampled_from([64, 192, 320]),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
    grid=st.sampled_from([INT4, INT3]),
)
def test_every_size_fits_the_format(
    exponent: int, rows: int, columns: int, group_size: int, seed: int, grid: Grid
) -> None:
    w = weights("student", rows, columns, seed) * 2.0**exponent
    matrix = round_grouped(w, group_size, grid)
    assert matrix.group_scale.shape == (rows, -(-columns // group_size))
    fits_the_format(matrix.q, matrix.group_scale, matrix.row_scale, grid)
    assert torch.isfinite(matrix.values()).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_zero_rows_and_groups(grid: str) -> None:
    w = weights("gaussian", 4, 256)
    w[1], w[2, :128] = 0, 0
    few, eight = round_grouped(w, 128, GRIDS[grid]), round_int8(w)
    assert (few.values()[1] == 0).all() and (few.values()[2, :128] == 0).all()
    assert (eight.values()[1] == 0).all()
    fits_the_format(few.q, few.group_scale, few.row_scale, GRIDS[grid])


@pytest.mark.parametrize("grid", [INT4, INT3], ids=["int4", "int3"])
def test_a_group_of_zeros_does_not_silence_its_row(grid: Grid) -> None:
    w = weights("gaussian", rows=8, columns=256)
    w[:, 224:] = 0  # what padding, or pruned channels, leave
    rounded = round_grouped(w, 32, grid)
    whole = round_grouped(w[:, :224], 32, grid)
    assert (rounded.row_scale > 0).all()
    assert torch.equal(rounded.values()[:, :224], whole.values()) and (rounded.values()[:, 224:] == 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_group_scale_is_the_best_there_is(grid: str) -> None:
    w, limits = weights("student", 32, 256), GRIDS[grid].limits
    row_scale, _ = grouped_scales(w, 64, GRIDS[grid])
    groups = w.unflatten(1, (-1, 64))
    scales = [sign * size for sign in GRIDS[grid].signs for size in range(1, 16)]
    errors = []
    for scale in scales:
        step = (row_scale * scale)[:, None, None]
        errors.append(((groups / step).round().clamp(*limits) * step - groups).square().sum(-1))
    chosen = best_group_scale(groups, row_scale, GRIDS[grid])
    place = torch.tensor([[scales.index(int(scale)) for scale in row] for row in chosen])
    got = torch.stack(errors).gather(0, place[None])[0]
    assert float(got.sum()) <= 1.001 * float(torch.stack(errors).amin(0).sum())


def test_int8_is_fp16_scaled_and_fine() -> None:
    w = weights("gaussian")
    matrix = round_int8(w)
    assert torch.equal(matrix.row_scale.half().float(), matrix.row_scale)
    assert matrix.q.min() >= -127 and matrix.q.max() <= 127
    assert (matrix.values() - w).norm() / w.norm() < 0.009


def test_activations_are_rounded_as_the_core_does() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0]])
    assert torch.equal(round_activations(x), torch.tensor([[127.0, 0, 2, -2], [0, 0, 0, 0]]))


def test_seven_bits() -> None:
    x = torch.tensor([0.0, 1.0, 1.0 + 1 / 64, 1.0 + 1 / 128 + 1e-6, 0.3, 2.0**-20 * 1.03])
    y = seven_bits(x)
    assert y[0] == 0 and y[1] == 1 and y[2] == 1 + 1 / 64 and y[3] == 1 + 1 / 64
    mantissa, _ = torch.frexp(y)
    assert torch.equal(mantissa * 128, (mantissa * 128).round())
    assert ((y[4] - 0.3).abs() / 0.3) < 1 / 128
