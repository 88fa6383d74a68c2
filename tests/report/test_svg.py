"""Axes tell the truth about their ticks; what is off the scale or without a bound neither breaks nor stretches them."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from snello.measure.interval import Interval
from snello.optimize.events import LadderRow
from snello.report import charts
from snello.report.svg import WIDTH, Canvas, axis, log_axis
from tests.report import samples


@pytest.mark.parametrize("values", [[0.0, 0.0098], [0.0, 1e-5], [-0.011, 0.031], [0.0, 3.2], [0.0, 0.0]])
def test_a_tick_says_where_it_is(values: list[float]) -> None:
    found = axis(values, 0, 100, "%")
    assert len({label for _, label in found.ticks}) == len(found.ticks) > 1
    for value, label in found.ticks:
        assert float(label.removesuffix("%")) / 100 == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 62, 4000])
def test_counts_have_whole_ticks(count: int) -> None:
    found = axis([0, count], 0, 100)
    assert all(label == str(int(value)) for value, label in found.ticks)
    assert found.high >= count


def test_no_bound_is_drawn_at_the_end_of_the_scale() -> None:
    found = axis([0.0, 0.01, sys.float_info.max], 0, 100, "%")
    assert found.high < 0.1
    assert found.at(sys.float_info.max) == 100
    assert log_axis([0.0], 0, 100).at(0.0) == 0


def test_a_hopeless_stage_leaves_the_others_room() -> None:
    stage = LadderRow(index=4, name="int2", kind="stage", verdict="dropped", reason="", loss=Interval(0.8, 0.9, 1.0))
    drawn = charts.ladder((*samples.rows()[:4], stage), 0.01).svg
    assert ">off the scale: 90.00%</text>" in drawn and ">4%</text>" in drawn and ">50%</text>" not in drawn


def test_labels_stay_apart_and_inside() -> None:
    canvas = Canvas(300)
    for _ in range(6):
        canvas.label(600, 150, "quantize int4, rtn")
    boxes = canvas.labels
    assert all(right <= WIDTH for _, right, _ in boxes)
    assert len({baseline for _, _, baseline in boxes}) == len(boxes)


def test_every_pareto_label_is_drawn() -> None:
    root = ElementTree.fromstring(charts.pareto(samples.proof().pareto, 0.01).svg)
    assert {"quantize int8", "quantize int4"} <= {element.text for element in root.iter("text")}
