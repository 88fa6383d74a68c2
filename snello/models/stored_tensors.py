"""What a checkpoint's tensors are made of: the inverse of reading, for whoever writes a folder for Transformers.

A stored tensor holds one canonical parameter or several, row after row or head by head; its values are asked for part
by part, so that one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snello.models.arrangement import Arrangement, Shape, join, stored_shape
from snello.models.families.family import Names
from snello.models.model import Floats
from snello.models.parameters import parameter_shapes
from snello.models.spec import Spec


@dataclass(frozen=True)
class StoredTensors:
    """`parts`: the canonical parameters in each tensor by its name, and how they lie there; `shapes` of the tensors."""

    parts: dict[str, tuple[tuple[str, ...], Arrangement]]
    shapes: dict[str, Shape]

    def values(self, name: str, value: Callable[[str], Floats]) -> Floats:
        """A tensor, from the values of its canonical parameters."""
        group, arrangement = self.parts[name]
        return join([value(part) for part in group], arrangement)


def stored_tensors(spec: Spec, names: Names) -> StoredTensors:
    """All tensors of a checkpoint, in the order of computation."""
    canonical = parameter_shapes(spec)
    parts: dict[str, tuple[tuple[str, ...], Arrangement]] = {}
    for name in canonical:
        source = names.sources[name]
        parts.setdefault(source.names[0], (source.stacked or (name,), source.arrangement))
    shapes = {
        stored: stored_shape([canonical[part] for part in group], arrangement)
        for stored, (group, arrangement) in parts.items()
    }
    return StoredTensors(parts, shapes)
