"""SparseGPT (arXiv:2301.00774): drop weights column by column, and let the columns still to come repair each loss.

With U^T U = (X^T X + damping)^-1, dropping w[n, k] costs `w[n, k]^2 / U[k, k]^2` and is repaired best by
`-w[n, k] U[k, k+1:] / U[k, k]`. Which weights go is settled for a block of columns when the block is reached (for N:M,
for a group of neighbours), on weights as repaired so far. Repairs reach past the block only at its end, as one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snello.techniques.sparsify.masks import lowest_of_groups, share_of_matrix

BLOCK = 128


def sparsegpt(weights: Tensor, factor: Tensor, share: float, group: int = 0) -> Tensor:
    """New weights (N, K), exactly zero where dropped; `factor` is U (K, K) of the input that they read."""
    w = weights.T.contiguous().clone()  # (K, N): a column of the matrix is contiguous
    factor = factor.to(w.dtype)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        block, local = w[start:stop], factor[start:stop, start:stop]
        dropped = _drop_block(block, local, share, group)
        w[stop:] -= factor[start:stop, stop:].T @ dropped
    return w.T.contiguous()


def _drop_block(w: Tensor, factor: Tensor, share: float, group: int) -> Tensor:
    """Works on a block (B, N) in place; what was dropped from each column over its diagonal, (B, N)."""
    pivots = factor.diagonal()[:, None]  # (B, 1)
    gone = torch.zeros_like(w, dtype=torch.bool) if group else share_of_matrix((w / pivots).square(), share)
    dropped = torch.zeros_like(w)
    for j in range(len(w)):
        if group and j % group == 0:
            here = slice(j, j + group)
            gone[here] = lowest_of_groups((w[here] / pivots[here]).square().T, group).T
        dropped[j] = torch.where(gone[j], w[j] / factor[j, j], 0.0)
        w[j + 1 :].addr_(factor[j, j + 1 :], dropped[j], alpha=-1)
    w.masked_fill_(gone, 0.0)
    return dropped
