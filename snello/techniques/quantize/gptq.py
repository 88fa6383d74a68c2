"""GPTQ (arXiv:2210.17323): round column by column, and let the columns still to come repair each error.

With G = X^T X of the inputs, the loss of a rounding is |(W - Q) X^T|^2. After column j is rounded, the best change of
the later ones is `-e U[j, j+1:] / U[j, j]`, U the upper Cholesky factor of the damped inverse of G. Updates reach past
the current block of columns only at its end, as one product, which is what makes this fast. Rows of all linears that
share an input are treated at once: they share G.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snello.techniques.curvature import inverse_factor
from snello.techniques.quantize.rounding import nearest

BLOCK = 128


def gptq(
    weights: Tensor,
    gram: Tensor,
    steps: Tensor,
    group_size: int,
    limits: tuple[int, int],
    refresh: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Integers q (N, K), INT8, for weights (N, K) on a grid of steps (N, G).

    `refresh(group, columns)` may give new steps (N) for a group from its columns (N, g) as repaired so far.
    """
    w = weights.T.contiguous().clone()  # (K, N): a column of the matrix is contiguous
    factor = inverse_factor(gram).to(w.dtype)
    q, steps = torch.zeros_like(w, dtype=torch.int8), steps.T.contiguous().clone()
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.zeros_like(w[start:stop])
        for j in range(start, stop):
            group, offset = divmod(j, group_size)
            if refresh is not None and offset == 0:
                steps[group] = refresh(group, w[j : min(j + group_size, stop)].T)
            rounded = nearest(w[j], steps[group], *limits)
            q[j] = rounded
            errors[j - start] = (w[j] - rounded * steps[group]) / factor[j, j]
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return q.T.contiguous()
