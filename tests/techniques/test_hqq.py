"""HQQ: the error it minimizes never rises, beats round-to-nearest where tails are heavy, and no text is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snello.errors import SnelloError
from snello.models import load
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.hqq import (
    GROWTH,
    POWER,
    ROUNDS,
    SHARPNESS,
    improve,
    mean_step,
    refine,
    robust_error,
    round_grouped_hqq,
    shrink,
)
from snello.techniques.quantize.rounding import INT3, INT4, Grid, Grouped, grouped_scales, round_grouped, seven_bits
from tests.checkpoints import make_checkpoint
from tests.techniques.test_quantize import folder_hash
from tests.techniques.test_rounding import weights

KINDS = ("gaussian", "laplace", "student", "outliers")


def matrix(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    if kind != "outliers":
        return weights(kind, rows, columns, seed)
    w = weights("gaussian", rows, columns, seed)
    w[:, ::37] *= 30
    return w


def naive_error(w: Tensor, rounded: Grouped) -> Tensor:
    """Sum of |w - w'|^p of each row (N), in double, from the values that the file will hold."""
    return (w.double() - rounded.values().double()).abs().pow(POWER).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 6),
    columns=st.sampled_from([64, 192, 320]),
    group_size=st.sampled_from([32, 64, 128]),
    exponent=st.integers(-16, 6),
    seed=st.integers(0, 99),
    grid=st.sampled_from([INT4, INT3]),
)
def test_the_error_never_rises(
    kind: str, rows: int, columns: int, group_size: int, exponent: int, seed: int, grid: Grid
) -> None:
    w = matrix(kind, rows, columns, seed) * 2.0**exponent
    groups = torch.nn.functional.pad(w, (0, -columns % group_size)).unflatten(1, (-1, group_size))
    row_scale, group_scale = grouped_scales(w, group_size, grid)
    unit, sharpness = mean_step(row_scale, group_scale), SHARPNESS
    errors = [robust_error(groups, row_scale[:, None] * group_scale, unit, grid).sum(1)]
    for _ in range(ROUNDS):
        row_scale, group_scale = improve(groups, row_scale, group_scale, sharpness, grid)
        errors.append(robust_error(groups, row_scale[:, None] * group_scale, unit, grid).sum(1))
        sharpness *= GROWTH
    trace = torch.stack(errors)
    assert (trace[1:] <= trace[:-1] * (1 + 1e-5)).all()
    best = round_grouped_hqq(w, group_size, grid)
    assert (naive_error(w, best) <= naive_error(w, round_grouped(w, group_size, grid)) * (1 + 1e-5)).all()
    size = best.group_scale.abs() if grid is INT3 else best.group_scale
    assert size.min() >= 1 and size.max() <= 15
    assert torch.equal(best.group_scale, best.group_scale.round())
    assert torch.equal(seven_bits(best.row_scale), best.row_scale)
    steps = best.row_scale[:, None] * best.group_scale
    assert torch.equal(steps.half().float(), steps)


@pytest.mark.parametrize(("kind", "left"), [("gaussian", 0.98), ("laplace", 0.94), ("student", 0.82)])
def test_the_heavier_the_tails_the_more_it_gains(kind: str, left: float) -> None:
    w = weights(kind, 64, 1024)
    assert naive_error(w, round_grouped_hqq(w, 128)).sum() < left * naive_error(w, round_grouped(w, 128)).sum()


def test_refining_is_those_rounds() -> None:
    """`refine` leaves rows that stand still alone; that changes nothing but time."""
    w = weights("student", 12, 512)
    groups, (row_scale, group_scale) = w.unflatten(1, (-1, 64)), grouped_scales(w, 64)
    together = refine(groups, row_scale, group_scale)
    for row in range(len(w)):
        r, s, sharpness = row_scale[row : row + 1], group_scale[row : row + 1], SHARPNESS
        for _ in range(ROUNDS):
            before, (r, s) = (r, s), improve(groups[row : row + 1], r, s, sharpness)
            if torch.equal(r, before[0]) and torch.equal(s, before[1]):
                break
            sharpness *= GROWTH
        assert torch.equal(together[0][row : row + 1], r) and torch.equal(together[1][row : row + 1], s)


def test_what_is_forgiven_is_the_papers_threshold() -> None:
    x = torch.linspace(-3, 3, 601)
    e = shrink(x, SHARPNESS)
    size = x.abs().double().clamp(min=1e-6)
    naive = x.sign() * (size - size ** (POWER - 1) / SHARPNESS).clamp(min=0)
    assert torch.allclose(e.double(), naive, atol=1e-6)
    half_quadratic = e.abs() ** POWER + SHARPNESS / 2 * (x - e) ** 2
    assert (half_quadratic <= x.abs() ** POWER + 1e-6).all()  # never worse than forgiving all
    assert (e[size < 0.1] == 0).all() and torch.equal(e, -e.flip(0))


def test_powers_of_two_change_nothing() -> None:
    w = weights("student", 16, 512)
    one, other = round_grouped_hqq(w, 64), round_grouped_hqq(w * 8, 64)
    assert torch.equal(one.q, other.q) and torch.equal(one.group_scale, other.group_scale)
    assert torch.equal(one.row_scale * 8, other.row_scale)


def test_zero_rows_and_groups() -> None:
    w = weights("student", 4, 256)
    w[1], w[2, :128] = 0, 0
    rounded = round_grouped_hqq(w, 128)
    assert (rounded.values()[1] == 0).all() and (rounded.values()[2, :128] == 0).all()
    assert torch.isfinite(rounded.values()).all()


def test_a_model_needs_no_text_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    for name in ("first", "second"):
        Quantize(method="hqq", group_size=32).apply(source, Context(output=tmp_path / name, threads=1))
    assert folder_hash(tmp_path / "first") == folder_hash(tmp_path / "second")
    plain = Quantize(group_size=32).apply(source, Context(output=tmp_path / "rtn"))
    assert (tmp_path / "first/model.safetensors").read_bytes() != (tmp_path / "rtn/model.safetensors").read_bytes()
    assert plain.spec == load(tmp_path / "first").spec


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_it_is_for_four_bits(weights: str) -> None:
    with pytest.raises(SnelloError, match="has nothing to do with") as caught:
        Quantize(method="hqq", weights=weights)  # type: ignore[arg-type]
    assert "int4" in str(caught.value.hint)
