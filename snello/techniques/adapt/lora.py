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


class LowRank(nn.Module):
    """y = base(x) + scale * B (A dropped(x))."""

    def __init__(self, base: nn.Linear, options: Adapt, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, options.scale
        bound = base.in_features**-0.5  # as PEFT draws it
        a = torch.empty(options.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a)  # (R, K)
        self.b = nn.Parameter(torch.zeros(base.out_features, options.rank))  # (N, R)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.a)  # (B, T, R)
        return cast(Tensor, self.base(x)) + self.scale * F.linear(low, self.b)


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
