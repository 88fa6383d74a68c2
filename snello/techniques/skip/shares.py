"""How much each input skips: what an input loses by its share is measured once, then shares are given out.

`Curve` is an input in numbers: sorted by what their absence costs, the values of some rows. Its loss at a share is the
part of the output's energy that goes with the values below the threshold, the weights' columns taken as orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 100  # shares are given out in hundredths
LARGEST = 0.9  # of one input


@dataclass(frozen=True)
class Curve:
    """`loss` and `threshold` at shares 0, 1/STEPS, ..., 1; `weight`: bytes of the weights that read this input."""

    loss: Tensor
    threshold: Tensor
    weight: float


def curve(rows: Tensor, norms: Tensor, weighted: bool, weight: float) -> Curve:
    """Of some rows (M, K) in their basis and the norms (K) of the weights that read each channel."""
    cost = (rows.abs() * norms).flatten()
    rank = cost if weighted else rows.abs().flatten()
    order = rank.argsort()
    energy = cost[order].double().square().cumsum(0)
    count = len(rank)
    places = [round(step / STEPS * count) for step in range(STEPS + 1)]
    loss = torch.tensor([energy[place - 1].item() if place else 0.0 for place in places])
    sorted_rank = rank[order]
    threshold = torch.stack([sorted_rank[min(place, count - 1)] for place in places])
    return Curve(loss / energy[-1].clamp(min=1e-30).item(), threshold, weight)


def uniform(curves: Mapping[str, Curve], share: float) -> dict[str, float]:
    return dict.fromkeys(curves, share)


def greedy(curves: Mapping[str, Curve], share: float) -> dict[str, float]:
    """Hundredths go where they add the least loss per byte that is not read, until the bytes' share is reached."""
    given = dict.fromkeys(curves, 0)
    left = share * sum(each.weight for each in curves.values())
    open_names = set(curves)
    while open_names:
        name = min(sorted(open_names), key=lambda each: _price(curves[each], given[each]))
        cost = curves[name].weight / STEPS
        if cost > left + 1e-9:
            open_names.discard(name)
            continue
        left -= cost
        given[name] += 1
        if given[name] >= LARGEST * STEPS:
            open_names.discard(name)
    return {name: count / STEPS for name, count in given.items()}


def _price(each: Curve, step: int) -> float:
    return (each.loss[step + 1] - each.loss[step]).item() / each.weight


def threshold_at(each: Curve, share: float) -> float:
    """Between the measured shares, linearly."""
    place = share * STEPS
    low = min(int(place), STEPS - 1)
    a, b = each.threshold[low].item(), each.threshold[low + 1].item()
    return a + (b - a) * (place - low)


def column_norms(weights: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each channel (K) over all rows that read it, in the basis of the weights."""
    total = torch.stack([w.square().sum(0) for w in weights]).sum(0)
    return total.sqrt()
