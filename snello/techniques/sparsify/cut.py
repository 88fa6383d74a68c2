"""One cut through the magnitudes of a whole model, found without holding it: two passes, one matrix at a time.

The bits of a non-negative FP32 number order as the number does. A histogram of their upper halves says in which bin the
cut lies, one of the lower halves within that bin says exactly where, and both together how many weights of each matrix
lie below. Of weights that equal the cut, those of earlier matrices go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALF_BITS = 16
BINS = 1 << HALF_BITS

Read = Callable[[str], Tensor]


def global_counts(names: Sequence[str], read: Read, share: float) -> dict[str, int]:
    """How many weights of each matrix are among the `round(share * all)` smallest of all matrices."""
    upper = torch.stack([_histogram(_bits(read(name)) >> HALF_BITS) for name in names])  # (matrices, BINS)
    goal = round(share * int(upper.sum()))
    bin, below = _place(upper, goal)
    lower = torch.stack([_histogram(_within(_bits(read(name)), bin)) for name in names])
    value, equal = _place(lower, goal - int(below.sum()))
    counts = below + equal
    counts += _first_come(lower[:, value], goal - int(counts.sum()))
    return dict(zip(names, counts.tolist(), strict=True))


def _bits(weights: Tensor) -> Tensor:
    return weights.float().abs().reshape(-1).view(torch.int32)


def _within(bits: Tensor, bin: int) -> Tensor:
    return bits[(bits >> HALF_BITS) == bin] & (BINS - 1)


def _histogram(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=BINS)


def _place(histograms: Tensor, goal: int) -> tuple[int, Tensor]:
    """The bin in which the `goal`-th value lies, and how many of each matrix lie in the bins before it."""
    reached = histograms.sum(0).cumsum(0)
    bin = min(int((reached < goal).sum()), BINS - 1)
    return bin, histograms[:, :bin].sum(1)


def _first_come(available: Tensor, wanted: int) -> Tensor:
    """`wanted` units taken from these, the first first."""
    taken = available.cumsum(0).clamp(max=wanted)
    return torch.diff(taken, prepend=torch.zeros(1, dtype=taken.dtype))
