"""GPTQ against the textbook: an explicit inverse, one column at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snello.techniques.curvature import damped
from snello.techniques.quantize.gptq import gptq
from snello.techniques.quantize.rounding import grouped_scales, nearest


def naive(w: Tensor, gram: Tensor, steps: Tensor, group_size: int, limits: tuple[int, int]) -> Tensor:
    """Optimal brain quantization in fixed order: after column j, invert what remains of G anew."""
    w, g = w.clone(), damped(gram)
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(g[j:, j:])
        step = steps[:, j // group_size]
        q[:, j] = nearest(w[:, j], step, *limits)
        error = (w[:, j] - q[:, j] * step) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0][None, :]
    return q


def problem(rows: int = 12, columns: int = 192, samples: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns) / columns**0.5
    x = (torch.randn(samples, columns) @ mix * torch.logspace(1, -1, columns)).double()
    return torch.randn(rows, columns).double(), x, x.T @ x


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_explicit_inverse(group_size: int) -> None:
    w, _, gram = problem()
    row_scale, group_scale = grouped_scales(w, group_size)
    steps = row_scale[:, None] * group_scale
    ours, expected = (f(w, gram, steps, group_size, (-8, 7)) for f in (gptq, naive))
    wide = steps.repeat_interleave(group_size, 1)[:, : w.shape[1]]
    assert ((ours - expected) * wide).abs().max() < 1e-4


def test_equals_explicit_inverse_at_eight_bits() -> None:
    w, _, gram = problem()
    steps = (w.abs().amax(1) / 127)[:, None]
    ours, expected = (f(w, gram, steps, w.shape[1], (-127, 127)) for f in (gptq, naive))
    assert ((ours - expected) * steps).abs().max() < 1e-4


def test_loses_less_than_nearest_on_correlated_inputs() -> None:
    w, x, gram = problem()
    row_scale, group_scale = grouped_scales(w, 64)
    steps = row_scale[:, None] * group_scale
    wide = steps.repeat_interleave(64, 1)
    plain = nearest(w, wide, -8, 7) * wide
    repaired = gptq(w, gram, steps, 64, (-8, 7)) * wide
    assert (x @ (repaired - w).T).square().sum() < 0.6 * (x @ (plain - w).T).square().sum()


def test_channels_never_seen_are_rounded_to_nearest() -> None:
    w, _, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    row_scale, group_scale = grouped_scales(w, 64)
    steps = row_scale[:, None] * group_scale
    q = gptq(w, gram, steps, 64, (-8, 7))
    assert torch.equal(q[:, 5].double(), nearest(w[:, 5], steps[:, 0], -8, 7))
    assert torch.isfinite(gptq(w, torch.zeros_like(gram), steps, 64, (-8, 7))).all()


def test_refresh_sees_each_group_once_and_is_obeyed() -> None:
    w, _, gram = problem()
    seen: list[int] = []

    def refresh(group: int, columns: Tensor) -> Tensor:
        assert columns.shape == (12, 64)
        seen.append(group)
        return torch.full((12,), 0.5, dtype=torch.float64)

    q = gptq(w, gram, torch.ones(12, 3).double(), 64, (-8, 7), refresh)
    assert seen == [0, 1, 2]
    assert torch.equal(q[:, 0].double(), nearest(w[:, 0], torch.full((12,), 0.5).double(), -8, 7))
