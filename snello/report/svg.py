"""Charts as SVG by hand: a frame, two axes, marks with shapes and tooltips. No script, no font, no dependency.

Lines and letters take the page's own colour, so dark pages and paper work; marks use the Okabe-Ito colours and a shape
each, so that no verdict hangs on colour. A chart is 640 by 60-360 units and scales with the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from snello.report.numbers import BEYOND

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 56, 16, 26, 40
LETTER, LINE = 6.6, 13  # width of a letter, height of a line
COLORS = {
    "kept": "#009E73",
    "dropped": "#D55E00",
    "not run": "#999999",
    "cannot tell": "#E69F00",
    "original": "#0072B2",
    "lean": "#009E73",
}


@dataclass(frozen=True)
class Axis:
    """Values to pixels. `ticks` are (value, label)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where `value` is drawn; what lies off the scale is drawn at its end."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = min(max(value, self.low), self.high)
        place = math.log10(value) if self.log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)


def axis(values: Sequence[float], start: float, end: float, unit: str = "", *, zero: bool = True) -> Axis:
    """A linear axis over `values` with four to six round ticks, whole numbers where there is no `unit` ("%", "x").

    `zero` keeps zero in view. A value without a bound does not stretch the axis.
    """
    known = [value for value in values if abs(value) < BEYOND]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 4)
    if not unit:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((n * step, _label(n * step, step, unit)) for n in range(first, last + 1))
    return Axis(first * step, last * step, start, end, ticks)


def _label(value: float, step: float, unit: str) -> str:
    """With as many digits as tell neighbouring ticks apart, exactly."""
    scale = 100 if unit == "%" else 1
    digits = next((d for d in range(6) if math.isclose(round(step * scale, d), step * scale, rel_tol=1e-9)), 6)
    return f"{value * scale + 0.0:.{digits}f}{unit}"


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Whole decades around `values`."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    ticks = tuple((10.0**n, f"{10.0**n:g}") for n in range(low, high + 1))
    return Axis(10.0**low, 10.0**high, start, end, ticks, log=True)


def _round_step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    return next((m * scale for m in (1.0, 2.0, 2.5, 5.0) if m * scale >= rough - 1e-12), 10 * scale)


@dataclass
class Canvas:
    """Collects elements; `svg` closes them into one accessible drawing."""

    height: int
    parts: list[str] = field(default_factory=list)
    labels: list[tuple[float, float, float]] = field(default_factory=list)  # left, right and baseline of each label

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "") -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style or "axis"}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def label(self, x: float, y: float, words: str) -> None:
        """Names the point (x, y) beside it, where no other label and no axis is."""
        width = LETTER * len(words)
        places = [(x + across, y + down) for down in (-8, 16, -22, 30, -36, 44) for across in (8, -8 - width)]
        inside = [place for place in places if self._is_free(place[0], place[0] + width, place[1])]
        left, baseline = (inside or places)[0]
        self.labels.append((left, left + width, baseline))
        self.text(left, baseline, words)

    def _is_free(self, left: float, right: float, baseline: float) -> bool:
        if left < LEFT or right > WIDTH or not TOP + LINE < baseline < self.height - BOTTOM - 3:
            return False
        return not any(
            left < other_right and other_left < right and abs(baseline - other) < LINE
            for other_left, other_right, other in self.labels
        )

    def polyline(self, points: Sequence[tuple[float, float]], style: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{style}"/>')

    def mark(self, x: float, y: float, kind: str, tip: str, size: float = 4) -> None:
        """One point: circle kept, cross dropped, square original, triangle undecided, ring not run."""
        color = COLORS.get(kind, "currentColor")
        s = size
        shapes = {
            "dropped": f'<path d="M{x - s:.1f} {y - s:.1f}l{2 * s} {2 * s}m0 {-2 * s}l{-2 * s} {2 * s}" '
            f'stroke="{color}" stroke-width="2" fill="none"',
            "original": f'<rect x="{x - s:.1f}" y="{y - s:.1f}" width="{2 * s}" height="{2 * s}" fill="{color}"',
            "cannot tell": f'<path d="M{x:.1f} {y - s:.1f}l{s} {2 * s}h{-2 * s}z" fill="{color}" stroke="currentColor"',
            "not run": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}" fill="none" stroke="{color}"',
        }
        shape = shapes.get(kind, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}" fill="{color}"')
        self.parts.append(f"{shape}><title>{escape(tip)}</title></{shape[1 : shape.index(' ')]}>")

    def frame(self, x: Axis, y: Axis | None, x_name: str, y_name: str = "") -> None:
        """Axes with ticks, grid and names."""
        floor = self.height - BOTTOM
        self.line(x.start, floor, x.end, floor)
        for value, label in x.ticks:
            self.line(x.at(value), floor, x.at(value), TOP, "grid")
            self.text(x.at(value), floor + 14, label, "middle")
        self.text(x.end, floor + 30, x_name, "end")
        if y is None:
            return
        for value, label in y.ticks:
            self.line(x.start, y.at(value), x.end, y.at(value), "grid")
            self.text(x.start - 6, y.at(value) + 4, label, "end")
        self.text(8, 14, y_name)

    def svg(self, title: str, description: str) -> str:
        head = f'<svg role="img" viewBox="0 0 {WIDTH} {self.height}"><title>{escape(title)}</title>'
        return f"{head}<desc>{escape(description)}</desc>{''.join(self.parts)}</svg>"
