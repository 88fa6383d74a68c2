"""The correction in torch: a linear that stays, and two thin matrices beside it that learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.models.model import Floats
from snello.models.reference import Reference

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.adapt import Adapt

TINY = torch.finfo(torch.float32).tiny  # a row of zeros stays one


class LowRank(nn.Module):
    """y = base(x) + scale * B (A dropped(x)).

    With `magnitude` m (N) (DoRA, arXiv:2402.09353) each output is turned to the length m: y = base(x) + (t - 1) W x +
    t * scale * B (A dropped(x)), t = m / |W + scale * B A| by rows, where no gradient flows through the length.
    """

    def __init__(self, base: nn.Linear, options: Adapt, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, options.scale
        bound = base.in_features**-0.5  # as PEFT draws it
        a = torch.empty(options.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a)  # (R, K)
        self.b = nn.Parameter(torch.zeros(base.out_features, options.rank))  # (N, R)
        self.dropout = nn.Dropout(options.dropout)
        self.magnitude = nn.Parameter(self._lengths()) if options.weight_decomposed else None  # (N)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.a)  # (B, T, R)
        own, change = cast(Tensor, self.base(x)), self.scale * F.linear(low, self.b)
        if self.magnitude is None:
            return own + change
        turn = self.magnitude / self._lengths()
        bare = own if self.base.bias is None else own - self.base.bias
        return own + (turn - 1) * bare + turn * change  # before the first step: own, to the bit

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Of the rows of the changed weights (N), never zero."""
        changed = self.base.weight + self.scale * (self.b @ self.a)
        lengths: Tensor = torch.linalg.vector_norm(changed, dim=1)
        return lengths.clamp(min=TINY)


def with_corrections(model: Model, options: Adapt, seed: int, whole: frozenset[str] = frozenset()) -> Reference:
    """The model, frozen, with an untrained correction beside each linear that is to be adapted but for `whole` ones.

    Weights that are stored in fewer bits stand in the reference as what they mean, in FP32.
    """
    module = Reference.from_model(model)
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in options.linears(model.spec):
        if f"{name}.weight" in whole:
            continue
        path, _, leaf = name.rpartition(".")
        half = module.get_submodule(path)
        setattr(half, leaf, LowRank(cast(nn.Linear, getattr(half, leaf)), options, generator))
    return module


def factors(module: Reference) -> dict[str, tuple[Floats, Floats]]:
    """What was learned, by canonical linear."""
    return {
        name: (part.a.detach().numpy().copy(), part.b.detach().numpy().copy())
        for name, part in module.named_modules()
        if isinstance(part, LowRank)
    }


def magnitudes(module: Reference) -> dict[str, Floats]:
    """The lengths that were learned, by canonical linear; none without `weight_decomposed`."""
    return {
        name: part.magnitude.detach().numpy().copy()
        for name, part in module.named_modules()
        if isinstance(part, LowRank) and part.magnitude is not None
    }
