"""The searched input scale: truly the minimum of its grid, and better than none where inputs have outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snello.models.spec import Format
from snello.techniques.quantize.awq import GRID, candidates, output_error, search_scale
from snello.techniques.quantize.basis import balanced_scale


def problem(outliers: bool) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    consumers = {"q": torch.randn(48, 192) * 0.02, "k": torch.randn(16, 192) * 0.03}
    rows = torch.randn(200, 192)
    if outliers:
        rows[:, ::50] *= 30
    return consumers, rows


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_scale_is_the_minimum_of_its_grid(weights: str, rotate: bool) -> None:
    consumers, rows = problem(outliers=True)
    group = 64 if weights == "int4" else 0
    format = Format(weights=weights, group_size=group, activations="int8", rotate=rotate, equalize=True)  # type: ignore[arg-type]
    formats = dict.fromkeys(consumers, format)
    choice = search_scale(consumers, formats, rows)
    scale_of = candidates(list(consumers.values()), rows)
    seen = dict.fromkeys(consumers, rows)
    errors = {point: output_error(consumers, formats, seen, scale_of(point)) for point in GRID}
    assert errors[choice.exponents] == min(errors.values())
    assert torch.equal(choice.scale, scale_of(choice.exponents))
    assert choice.errors == errors


@pytest.mark.parametrize(("rotate", "left"), [(True, 0.2), (False, 0.9)])
def test_outliers_are_tamed(rotate: bool, left: float) -> None:
    consumers, rows = problem(outliers=True)
    format = Format(weights="int4", group_size=64, activations="int8", rotate=rotate, equalize=True)
    formats = dict.fromkeys(consumers, format)
    choice = search_scale(consumers, formats, rows)
    assert choice.exponents[0] > 0
    seen = dict.fromkeys(consumers, rows)
    assert output_error(consumers, formats, seen, choice.scale) < left * output_error(consumers, formats, seen, None)


@pytest.mark.parametrize("rotate", [True, False])
def test_plain_inputs_lose_nothing_by_equalizing(rotate: bool) -> None:
    """Channels of nearly equal strength stay nearly equal."""
    consumers, rows = problem(outliers=False)
    format = Format(weights="int4", group_size=64, activations="int8", rotate=rotate, equalize=True)
    formats = dict.fromkeys(consumers, format)
    scale = balanced_scale(torch.ones(192), list(consumers.values()))
    seen = dict.fromkeys(consumers, rows)
    assert output_error(consumers, formats, seen, scale) < 1.05 * output_error(consumers, formats, seen, None)
