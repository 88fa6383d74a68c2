"""How to train: the options of the loop, checked when they are made, and the learning rate of each step. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from snello.errors import SnelloError

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One run of the loop. Weights and optimizer stay FP32; `precision` is what products are computed in.

    Args:
        steps: updates of the weights.
        rate: the largest learning rate.
        schedule: how the rate falls after the warm-up: "cosine" and "linear" to zero at the end; "constant" not before
            the last `decay_steps`, over which it falls linearly (so a constant run can be extended, or ended anywhere).
        warmup_steps: over which the rate rises linearly.
        decay_steps: see `schedule`; only with "constant".
        weight_decay: AdamW's, on matrices only.
        clip: the largest norm of the gradient; a larger one is scaled down.
        seed: of everything that is random in a loss. Data has its own.
        precision: "bf16", "fp32", or "auto": BF16 where this machine multiplies it.
        accumulate: pieces that a batch is cut into, one in memory at a time. Their losses are averaged by rows.
        recompute: forget what blocks computed, and compute it again for the gradient (gradient checkpointing).
        save_seconds: how often a checkpoint is written, where there is a folder for it.
        max_minutes: refuse a run that a timed trial says would take longer. None: no limit.
        threads: of torch; None leaves them as they are.
    """

    steps: int
    rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    accumulate: int = 1
    recompute: bool = False
    save_seconds: float = 60.0
    max_minutes: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("warmup_steps", 0), ("decay_steps", 0), ("seed", 0), ("accumulate", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SnelloError(f"{name}={value!r} is not a whole number of at least {least}", f"{name}={least + 1}")
        for name in ("rate", "clip"):
            check_positive(name, getattr(self, name))
        if not (isinstance(self.weight_decay, (int, float)) and 0 <= self.weight_decay < 1):
            raise SnelloError(f"weight_decay={self.weight_decay!r} is not in 0..1", "weight_decay=0.01 is usual")
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("precision", self.precision, get_args(Precision))
        if self.decay_steps and self.schedule != "constant":
            raise SnelloError(f"decay_steps with schedule={self.schedule}", "it belongs to schedule=constant")
        if self.max_minutes is not None:
            check_positive("max_minutes", self.max_minutes)

    def rate_at(self, step: int) -> float:
        """The learning rate of an update, the first being 0; the last still learns a little."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.rate * min(warm, (self.steps - step) / max(1, self.decay_steps) if self.decay_steps else 1.0)
        if warm < 1.0:
            return self.rate * warm
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.rate * (left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SnelloError(f"{name}={value!r} is not a number above zero", f"leave {name} out for its default")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SnelloError(f"{name}={value!r} is not an option", f"one of: {', '.join(choices)}")
