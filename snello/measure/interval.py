"""A number and how far it can be off: the one shape in which measured quantities travel.

`mid` is the estimate; `low` and `high` bound it. What the bounds are is said where the interval is made:
one-sided 95% bounds for losses, two-sided 95% for ratios of time. Plain values: into JSON and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    low: float
    mid: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"low": self.low, "mid": self.mid, "high": self.high}

    @classmethod
    def from_json(cls, value: Mapping[str, float]) -> Interval:
        return cls(float(value["low"]), float(value["mid"]), float(value["high"]))

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value, value, value)

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def inverse(self) -> Interval:
        """The interval of 1 / x, for positive x: a cost ratio becomes a speed-up."""
        return Interval(1 / self.high, 1 / self.mid, 1 / self.low)
