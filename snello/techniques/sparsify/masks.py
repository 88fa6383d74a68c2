"""Which weights go: the lowest scores of a matrix, of each row, or of each small group of neighbours; or whole lines.

Masks are true where a weight becomes zero. How many go is rounded as in torch.nn.utils.prune, and which of equal scores
go is torch.topk's choice as there, so that magnitude masks are the ones that people know. Pure tensor arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of all scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    if count:
        mask[torch.topk(scores.reshape(-1), count, largest=False).indices] = True
    return mask.reshape(scores.shape)


def lowest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row of (N, K)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.topk(scores, count, dim=1, largest=False).indices, True) if count else mask


def lowest_of_groups(scores: Tensor, group: int) -> Tensor:
    """Half of every `group` neighbours in a row of (N, K): 2:4 for 4, 4:8 for 8."""
    assert scores.shape[1] % group == 0 and group % 2 == 0
    return lowest_of_rows(scores.reshape(-1, group), group // 2).reshape(scores.shape)


def weakest_lines(weights: Tensor, share: float, dim: int) -> Tensor:
    """Whole rows (`dim` 0) or columns (1) of (N, K): those of the smallest L2 norm, as ln_structured chooses them."""
    norms = torch.linalg.vector_norm(weights, dim=1 - dim)
    kept = torch.topk(norms, len(norms) - round(share * len(norms))).indices
    mask = torch.ones_like(norms, dtype=torch.bool).index_fill(0, kept, False)
    return mask.unsqueeze(1 - dim).expand(weights.shape)


def share_of_matrix(scores: Tensor, share: float) -> Tensor:
    return lowest(scores, round(share * scores.numel()))


def share_of_rows(scores: Tensor, share: float) -> Tensor:
    return lowest_of_rows(scores, round(share * scores.shape[1]))


def wanda_scores(weights: Tensor, energy: Tensor) -> Tensor:
    """|w| |x|_2 (N, K), from the mean square of each input channel (K): the norm up to a factor that ranks alike."""
    return weights.abs() * energy.sqrt().to(weights.dtype)
