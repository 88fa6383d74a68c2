"""How the loss of a linear bends: its Gram matrix, damped and inverted; shared by the methods that repair errors.

With G = X^T X of the inputs, changing weights by D costs |D X^T|^2 = tr(D G D^T). Optimal brain surgery fixes one
column after the other and needs the inverse of what remains of G each time; all of those stand in the rows of one upper
Cholesky factor of the whole inverse (arXiv:2210.17323), which is what `inverse_factor` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01


def inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = (G + damping)^-1; in double, since G is often nearly singular."""
    factor: Tensor = torch.linalg.cholesky(damped(gram))
    factor = torch.cholesky_inverse(factor)  # one name for all three, so that two are in memory at most
    return torch.linalg.cholesky(factor, upper=True)  # type: ignore[no-any-return]


def damped(gram: Tensor) -> Tensor:
    """G in double plus a little of its mean diagonal; channels never seen get that alone."""
    g = gram.double().clone()
    ridge = max(g.diagonal().mean().item() * DAMPING, 1e-30)
    g.diagonal().add_(ridge)
    return g
