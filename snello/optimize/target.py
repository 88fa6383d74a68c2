"""What counts as success: a speed-up by the goal ("2x"), or a size while serving ("300MB").

The least that is known counts, never the estimate: the lower bound of a speed-up, the highest peak of all runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from snello.errors import SnelloError
from snello.measure.interval import Interval

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WORDS = {"latency": "faster", "throughput": "the throughput", "memory": "less memory"}


@dataclass(frozen=True)
class Target:
    """`value`: times, or bytes."""

    value: float
    unit: Literal["x", "bytes"] = "x"

    def __str__(self) -> str:
        if self.unit == "x":
            return f"{self.value:g}x"
        name, size = next((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if self.value >= size)
        return f"{self.value / size:.15g}{name}"

    @classmethod
    def parse(cls, value: Any, name: str = "target") -> Target:
        """2, "2x" or "300MB".

        Raises:
            SnelloError: it is none of these, a speed-up below 1x, or less than a kilobyte.
        """
        if isinstance(value, cls):
            return value
        size = re.fullmatch(r"([0-9.]+) *([KMG]i?B)", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
        try:
            if isinstance(value, bool):
                raise ValueError
            if size is not None:
                return cls._of_bytes(float(size[1]) * UNITS[size[2].upper()], value, name)
            number = float(value.strip().removesuffix("x") if isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            raise SnelloError(
                f"{name} is {value!r}", 'write a speed-up such as "2x", or a size such as "300MB"'
            ) from error
        if not 1 <= number < 1000:
            raise SnelloError(f"{name} is {value!r}", 'it must be at least 1x; a size has a unit: "300MB"')
        return cls(number)

    @classmethod
    def _of_bytes(cls, size: float, value: str, name: str) -> Target:
        if not 1e3 <= size < 1e15:
            raise SnelloError(f"{name} is {value!r}", 'write what a process can hold, such as "300MB"')
        return cls(float(int(size)), "bytes")

    def to_toml(self) -> float | str:
        return self.value if self.unit == "x" else str(self)

    def reached(self, speedup: Interval, peak: int | None) -> bool:
        """`peak`: the most resident bytes of any run."""
        if self.unit == "x":
            return speedup.low >= self.value
        return peak is not None and peak <= self.value

    def missed(self, goal: str, speedup: Interval, peak: int | None, what: str) -> str:
        """One line: how near `what` came, and what would have counted."""
        near = f"{what} came to {speedup.mid:.2f}x {WORDS[goal]} ({speedup.low:.2f}-{speedup.high:.2f})"
        if self.unit == "bytes":
            near = f"{what} serves in {peak / 1e6:,.1f} MB" if peak is not None else f"{what} was not measured"
        return f"target of {self} missed: {near}"
