"""Rounding to the integer formats: the format's own rules, and how much the two-level scale costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snello.techniques.quantize.rounding import (
    best_group_scale,
    int4_scales,
    round_activations,
    round_int4,
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


def fp16_group_error(w: Tensor, group_size: int) -> float:
    """Squared error of round-to-nearest with the best FP16 scale per group out of 60: the plain format."""
    groups = w.unflatten(1, (-1, group_size))
    best = torch.full(groups.shape[:2], float("inf"))
    for shrink in np.arange(0.4, 1.6, 0.02):
        step = (groups.abs().amax(-1) / 8 * shrink).half().float()[..., None]
        error = ((groups / step).round().clamp(-8, 7) * step - groups).square().sum(-1)
        best = torch.minimum(best, error)
    return float(best.sum())


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student"])
@pytest.mark.parametrize(("group_size", "allowed"), [(128, 1.02), (64, 1.03), (32, 1.05)])
def test_two_levels_cost_little(kind: str, group_size: int, allowed: float) -> None:
    w = weights(kind)
    error = float((round_int4(w, group_size).values() - w).square().sum())
    assert (error / fp16_group_error(w, group_size)) ** 0.5 < allowed


def fits_the_format(matrix_q: Tensor, group_scale: Tensor, row_scale: Tensor) -> None:
    assert matrix_q.min() >= -8 and matrix_q.max() <= 7 and matrix_q.dtype == torch.int8
    assert group_scale.min() >= 1 and group_scale.max() <= 15 and torch.equal(group_scale, group_scale.round())
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
)
def test_every_size_fits_the_format(exponent: int, rows: int, columns: int, group_size: int, seed: int) -> None:
    w = weights("student", rows, columns, seed) * 2.0**exponent
    matrix = round_int4(w, group_size)
    assert matrix.group_scale.shape == (rows, -(-columns // group_size))
    fits_the_format(matrix.q, matrix.group_scale, matrix.row_scale)
    assert torch.isfinite(matrix.values()).all()


def test_zero_rows_and_groups() -> None:
    w = weights("gaussian", 4, 256)
    w[1], w[2, :128] = 0, 0
    four, eight = round_int4(w, 128), round_int8(w)
    assert (four.values()[1] == 0).all() and (four.values()[2, :128] == 0).all()
    assert (eight.values()[1] == 0).all()
    fits_the_format(four.q, four.group_scale, four.row_scale)


def test_group_scale_is_the_best_of_fifteen() -> None:
    w = weights("student", 32, 256)
    row_scale, _ = int4_scales(w, 64)
    groups = w.unflatten(1, (-1, 64))
    errors = []
    for scale in range(1, 16):
        step = (row_scale * scale)[:, None, None]
        errors.append(((groups / step).round().clamp(-8, 7) * step - groups).square().sum(-1))
    chosen = best_group_scale(groups, row_scale).long() - 1
    got = torch.stack(errors).gather(0, chosen[None])[0]
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
