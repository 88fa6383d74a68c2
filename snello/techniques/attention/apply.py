"""Writes the model under its new spec: what is new in the weights is made as each is asked for.

Windows and sinks change no weight. Fewer key-value heads are pooled from the old ones, global projections begin as
copies of the local ones, and an encoder's positions are its own over and over.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

import numpy as np

from snello.errors import Unsupported
from snello.models import load
from snello.models.lean import write_lean_folder
from snello.models.model import Floats, Model, Weights
from snello.models.pack_cache import pack
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import check_free, shaped_config, write_plain_folder
from snello.models.spec import Spec
from snello.techniques.attention.conversion import mixers

if TYPE_CHECKING:
    from snello.techniques.attention import CheaperAttention, Pooling
    from snello.techniques.base import Context


def lighten(options: CheaperAttention, model: Model, context: Context) -> Model:
    planned = options.plan(model.spec)
    weights = Converted(model.weights, model.spec, planned, options.pooling, context.seed)
    entry = {"technique": "attention", "options": dataclasses.asdict(options), "seed": context.seed}
    try:
        shaped_config(model, planned)
    except Unsupported as reason:  # stock Transformers cannot load the result: our own statement of it
        entry["note"] = f"a lean folder, for this engine only: {reason.message}"
        history = (*model.history, entry)
        result = dataclasses.replace(model, spec=planned, weights=weights)
        write_lean_folder(context.output, planned, model, history, lambda writer: pack(result, writer))
        return load(context.output)
    check_free(context.output)
    write_plain_folder(context.output, planned, model, (*model.history, entry), weights.values)
    return load(context.output)


class Converted:
    """The weights of `planned`, made of those of `spec`."""

    def __init__(self, weights: Weights, spec: Spec, planned: Spec, pooling: Pooling, seed: int) -> None:
        self._weights, self._spec, self._planned = weights, spec, planned
        self._pooling, self._seed = pooling, seed
        self._shapes = parameter_shapes(planned)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def values(self, name: str) -> Floats:
        values = self._weights.values(name.replace(".global_", "."))
        if name == "embedding.positions.weight":
            return self._positions(values)
        return self._pooled(name, values) if values.shape != self._shapes[name] else values

    def _positions(self, table: Floats) -> Floats:
        """(P, D) -> (offset + positions, D): the old ones over and over; rows before the offset are never read."""
        old, new = self._spec.embedding, self._planned.embedding
        position = np.arange(new.learned_positions) - new.position_offset
        count = old.learned_positions - old.position_offset
        return table[old.position_offset + position % count]

    def _pooled(self, name: str, values: Floats) -> Floats:
        """(K E, ...) -> (k E, ...): K / k heads that stand together become one."""
        index = int(name.split(".")[1])
        old, new = mixers(self._spec)[index], mixers(self._planned)[index]
        groups = values.reshape(new.num_kv_heads, old.num_kv_heads // new.num_kv_heads, old.head_dim, *values.shape[1:])
        if self._pooling == "mean":
            merged = groups.mean(axis=1, dtype=np.float64).astype(np.float32)
        elif self._pooling == "first":
            merged = groups[:, 0]
        else:
            random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
            merged = (random.standard_normal(groups[:, 0].shape) * values.std()).astype(np.float32)
        return np.ascontiguousarray(merged.reshape(self._shapes[name]))
