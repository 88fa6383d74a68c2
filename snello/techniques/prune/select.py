"""Which channels, heads, dimensions and layers stay, and what the kept ones take over: tensors in, tensors out.

All choices break ties towards the earlier index and come back in ascending order, so what is kept keeps its order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 1e-2  # of the mean diagonal of the Gram matrix


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def energy(weight: Tensor, gram: Tensor, size: int) -> Tensor:
    """What each block of `size` input columns adds to the squared output, tr(W_j G_jj W_j^T).

    With size 1 this is Wanda's |w| * |x| (arXiv:2306.11695), squared and summed over the channel's outputs.
    """
    blocks = weight.double().T.reshape(-1, size, weight.shape[0])  # (K / size, size, N)
    diagonal = torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])
    return (blocks * (diagonal @ blocks)).sum((1, 2))


def heads(scores: Tensor, groups: int, kept_groups: int, kept_queries: int) -> tuple[Tensor, Tensor]:
    """(query heads, kv heads) that stay: the loudest groups, and in each its loudest queries."""
    by_group = scores.reshape(groups, -1)
    queries = by_group.shape[1]
    kept = top(by_group.sum(1), kept_groups)
    inside = [top(by_group[group], kept_queries) + group * queries for group in kept]
    return torch.cat(inside), kept


def compensated(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """The kept columns, changed least so that they give what all gave: W_K + W_R G_RK (G_KK + damping)^-1.

    Where the removed columns add nothing, or share nothing with the kept, the weights stay as they are.
    """
    removed = torch.ones(len(gram), dtype=torch.bool)
    removed[kept] = False
    inner = gram[kept][:, kept]
    damping = DAMPING * float(inner.diagonal().mean()) + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(inner + damping * torch.eye(len(inner), dtype=gram.dtype))
    across = weight[:, removed].double() @ gram[removed][:, kept]  # (N, kept)
    return (weight[:, kept].double() + torch.cholesky_solve(across.T, factor).T).float()


def norm_correction(power: Tensor, kept: Tensor) -> float:
    """By how much a norm over the kept dimensions is too small or large: an RMS over fewer, louder rows is larger."""
    whole, part = float(power.mean()), float(power[kept].mean())
    return (part / whole) ** 0.5 if whole > 0 else 1.0


def least_influence(influence: Sequence[float], count: int) -> list[int]:
    """The layers that stay."""
    return [int(index) for index in top(torch.tensor(influence, dtype=torch.float64), count)]


def expand(blocks: Tensor, size: int) -> Tensor:
    """Rows or columns of whole blocks: [0, 2] of size 3 -> [0, 1, 2, 6, 7, 8]."""
    return (blocks[:, None] * size + torch.arange(size)).flatten()
