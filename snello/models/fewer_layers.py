"""Weights seen with fewer layers: nothing is copied before it is asked for. Pruning and distillation start from it."""

from __future__ import annotations

from collections.abc import Sequence

from snello.models.model import Floats, Weights


class FewerLayers:
    """Layer i of this view is layer `kept[i]` of `weights`."""

    def __init__(self, weights: Weights, kept: Sequence[int]) -> None:
        self._weights, self._kept = weights, list(kept)
        places = {old: new for new, old in enumerate(self._kept)}
        self._names: dict[str, str] = {}
        for name in weights.names():
            head, _, rest = name.partition(".")
            if head != "layers":
                self._names[name] = name
                continue
            index, _, rest = rest.partition(".")
            if int(index) in places:
                self._names[f"layers.{places[int(index)]}.{rest}"] = name

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._names[name])

    def values(self, name: str) -> Floats:
        return self._weights.values(self._names[name])
