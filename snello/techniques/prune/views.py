"""Weights seen with fewer hidden dimensions: nothing is copied before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from snello.models.model import Floats, Weights
from snello.models.parameters import parameter_shapes
from snello.models.spec import Spec


class Narrower:
    """Only the hidden dimensions `kept`; norms of the stream are multiplied by `gains`.

    A parameter's axes are hidden by their role, never by their size: a feed-forward may be as wide as the stream.
    """

    def __init__(self, weights: Weights, spec: Spec, kept: npt.NDArray[np.int64], gains: Mapping[str, float]) -> None:
        self._weights, self._kept, self._gains = weights, kept, dict(gains)
        self._shapes = parameter_shapes(spec)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        axes = hidden_axes(name)
        return tuple(len(self._kept) if axis in axes else size for axis, size in enumerate(self._shapes[name]))

    def values(self, name: str) -> Floats:
        values = self._weights.values(name)
        for axis in hidden_axes(name):
            values = np.take(values, self._kept, axis=axis)
        stem = name.rpartition(".")[0]
        return values * np.float32(self._gains[stem]) if stem in self._gains else values


def hidden_axes(name: str) -> tuple[int, ...]:
    """Which axes of a parameter run over the residual stream."""
    stem, _, suffix = name.rpartition(".")
    last = stem.rpartition(".")[2]
    if last == "norm":
        return (0,)
    if last in ("o", "down"):
        return (0,)
    if suffix == "weight" and (
        last in ("q", "k", "v", "gate", "up") or name in ("head.weight", "embedding.tokens.weight")
    ):
        return (1,)
    return ()
