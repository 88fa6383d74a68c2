"""The convolution that adds most nearly what an attention layer added, by least squares on calibration text.

With both gates at 1 a convolution is linear in the rows that it sees, so the best one needs only sums over the text:
Z^T Z and Z^T A, where a row of Z is the inputs of the last K positions (and a 1), and a row of A what attention added.
The full solution has K D channels; the D strongest are kept, each at one tap, and what reads them is solved again.
Shapes: N rows, D hidden size, K kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from snello.models.reference_layers import Half

DAMPING = 1e-3  # of the mean power of an input, added to all of them


@dataclass(frozen=True)
class Fitted:
    """`parameters` of the convolution by their names in it; `unexplained`: share of the energy that it misses."""

    parameters: dict[str, Tensor]
    unexplained: float


@dataclass
class Moments:
    """Sums over text: (K D + 1, K D + 1), (K D + 1, D), and the energy of what attention added around its mean."""

    gram: Tensor
    cross: Tensor
    energy: float
    rows: int


def moments(half: Half, hidden: list[Tensor], kernel: int) -> Moments:
    """Of an attention half, on the rows (B, T, D) that it is given."""
    size = hidden[0].shape[-1]
    gram = torch.zeros(kernel * size + 1, kernel * size + 1, dtype=torch.float64)
    cross, energy = torch.zeros(kernel * size + 1, size, dtype=torch.float64), 0.0
    total, rows = torch.zeros(size, dtype=torch.float64), 0
    for x in hidden:
        z = seen_rows(half.prepare(x), kernel)  # (B T, K D + 1)
        a = half.added(x).flatten(0, 1)  # (B T, D)
        gram += (z.T @ z).double()
        cross += (z.T @ a).double()
        energy, total, rows = energy + float(a.double().square().sum()), total + a.double().sum(0), rows + len(a)
    return Moments(gram / rows, cross / rows, energy / rows - float((total / rows).square().sum()), rows)


def seen_rows(y: Tensor, kernel: int) -> Tensor:
    """(B, T, D) -> (B T, K D + 1): the row itself, the one before, ..., and a 1; zeros before the text begins."""
    parts = [F.pad(y, (0, 0, back, 0))[:, : y.shape[1]] for back in range(kernel)]
    return torch.cat((*parts, y.new_ones(*y.shape[:2], 1)), dim=-1).flatten(0, 1)


def fit(sums: Moments, kernel: int) -> Fitted:
    """The weights of b, c, x, taps and o."""
    size = sums.cross.shape[1]
    gram = damped(sums.gram)
    solution = torch.linalg.solve(gram, sums.cross)  # (K D + 1, D)
    channels, backs = strongest(gram, solution, kernel)
    select = spread(channels, backs, kernel)  # (K D + 1, D + 1)
    inner = select.T @ gram @ select
    output = torch.linalg.solve(inner, select.T @ sums.cross)  # (D + 1, D)
    parameters = {
        "x.weight": channels.T,
        "x.bias": torch.zeros(size),
        "taps.weight": F.one_hot(kernel - 1 - backs, kernel).T,
        "taps.bias": torch.zeros(size),
        "o.weight": output[:-1].T,
        "o.bias": output[-1],
    }
    for gate in ("b", "c"):
        parameters |= {f"{gate}.weight": torch.zeros(size, size), f"{gate}.bias": torch.ones(size)}
    return Fitted(
        {name: value.float().contiguous() for name, value in parameters.items()}, missed(sums, select @ output)
    )


def damped(gram: Tensor) -> Tensor:
    """The constant is not damped: a mean costs nothing."""
    power = gram.diagonal()[:-1].mean()
    extra = torch.full((len(gram),), float(power) * DAMPING + 1e-12, dtype=gram.dtype)
    extra[-1] = 0.0
    return gram + torch.diag(extra)


def strongest(gram: Tensor, solution: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Directions (D, D) of the input as columns, each of mean power 1, and how far back (D) each looks."""
    size = solution.shape[1]
    directions, strengths, backs = [], [], []
    for back in range(kernel):
        part = slice(back * size, (back + 1) * size)
        root = torch.linalg.cholesky(gram[part, part])  # y^T y = root root^T on average
        left, strength, _ = torch.linalg.svd(root.T @ solution[part])
        directions.append(torch.linalg.solve_triangular(root.T, left, upper=True))
        strengths.append(strength)
        backs.append(torch.full((size,), back))
    order = torch.cat(strengths).argsort(descending=True, stable=True)[:size].sort().values
    return torch.cat(directions, dim=1)[:, order], torch.cat(backs)[order]


def spread(channels: Tensor, backs: Tensor, kernel: int) -> Tensor:
    """(K D + 1, D + 1): how the channels, and a 1, are made of the rows that are seen."""
    size = len(channels)
    select = torch.zeros(kernel * size + 1, size + 1, dtype=channels.dtype)
    for back in range(kernel):
        own = backs == back
        select[back * size : (back + 1) * size, :-1][:, own] = channels[:, own]
    select[-1, -1] = 1.0
    return select


def missed(sums: Moments, linear: Tensor) -> float:
    """Share of the energy around the mean that this map (K D + 1, D) of the rows seen does not explain."""
    mean = sums.cross[-1].square().sum()
    residual = sums.energy + mean - 2 * (linear * sums.cross).sum() + (linear * (sums.gram @ linear)).sum()
    return max(0.0, float(residual) / max(sums.energy, 1e-30))
