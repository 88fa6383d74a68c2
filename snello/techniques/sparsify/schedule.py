"""Gradual pruning: how sparse a model is to be at each step of a training, by the polynomial of Zhu and Gupta.

Pure arithmetic over the number of the step (arXiv:1710.01878), with the conventions of TensorFlow Model Optimization's
`PolynomialDecay`: constant before `begin` and after `end`, and masks are made anew every so many steps between them, so
that weights have time to recover. A training asks `due`, then cuts to `sparsity`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snello.errors import SnelloError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin)) ** power."""

    initial: float = field(default=0.0, metadata={"help": "Share of zeros at the first cut."})
    final: float = field(default=0.5, metadata={"help": "Share of zeros from the step `end` on."})
    begin: int = field(default=0, metadata={"help": "Step of the first cut."})
    end: int = field(metadata={"help": "Step of the last cut."})
    power: float = field(default=3.0, metadata={"help": "Exponent: higher cuts earlier; 1 is a straight line."})
    every: int = field(default=100, metadata={"help": "Steps between two cuts."})

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            if not 0 <= getattr(self, name) < 1:
                raise SnelloError(f"{name}={getattr(self, name)} is not a share below 1", "final=0.5 is a good start")
        if self.begin < 0 or self.end <= self.begin:
            raise SnelloError(f"a schedule from step {self.begin} to {self.end}", "0 <= begin < end")
        if self.power <= 0 or self.every < 1:
            raise SnelloError(f"power={self.power}, every={self.every}", "power is above 0, every at least 1")

    def sparsity(self, step: int) -> float:
        """The share of zeros at this step."""
        left = 1 - min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.final + (self.initial - self.final) * float(left**self.power)

    def due(self, step: int) -> bool:
        """Whether masks are made anew at this step."""
        return self.begin <= step <= self.end and (step - self.begin) % self.every == 0
