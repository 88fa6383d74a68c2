"""Attention that costs less: rows that see a window, fewer key-value heads, encoders for long texts. Options and plan.

`conversion` says exactly what becomes of a spec, `apply` writes it. The latter is not imported before it runs, so that
planning and explaining need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from snello.errors import SnelloError
from snello.models.spec import Spec
from snello.techniques.attention.conversion import convert
from snello.techniques.units import layer_numbers

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

Pooling = Literal["mean", "first", "random"]


@dataclass(frozen=True, kw_only=True)
class CheaperAttention:
    """Let rows see only a window (and the first positions), or let more queries share their keys and values.

    Idea: full attention reads all positions for every token. A window with a few first positions (sinks) reads a
    constant number, and older pages of the cache are reused. Fewer key-value heads shrink every position. An encoder
    becomes a Longformer: a window, a global [CLS], positions repeated so that long texts fit.

    Formula: row p sees {j <= p : j > p - window or j < sinks}, positions as trained; an encoder's row sees window / 2
    to each side and [CLS]. The keys and values of a new group are the mean of its old heads': W' = sum W_i / n.

    When it hurts: what lies beyond the window is gone, however good the average loss looks: measure recall. Pooled
    heads are wrong until healed by a few steps of training. Short texts gain nothing from a window.

    Papers: Longformer arXiv:2004.05150, StreamingLLM arXiv:2309.17453, grouped queries arXiv:2305.13245.
    """

    window: int = field(default=0, metadata={"help": "Positions that a row sees, its own included; 0 changes nothing."})
    sinks: int = field(default=0, metadata={"help": "First positions that every row of a decoder goes on seeing."})
    layers: str = field(
        default="all", metadata={"help": "Which layers get the window: all, or numbers from 0 on such as 0,2,5-7."}
    )
    positions: int = field(
        default=0, metadata={"help": "Positions of an encoder's result, by repeating its own; 0 keeps them."}
    )
    kv_heads: int = field(default=0, metadata={"help": "Key-value heads that are left of a decoder's; 0 keeps them."})
    pooling: Pooling = field(
        default="mean", metadata={"help": "Heads of a new group: their mean, the first, or random weights to compare."}
    )

    def __post_init__(self) -> None:
        for option in ("window", "sinks", "positions", "kv_heads"):
            value = getattr(self, option)
            if type(value) is not int or value < 0:
                raise SnelloError(f"{option}={value!r} is not a count", f"{option}=0 leaves it as it is")
        if self.pooling not in get_args(Pooling):
            raise SnelloError(f"pooling={self.pooling!r} is not an option of attention", "mean, first or random")
        if not isinstance(self.layers, str):
            raise SnelloError(f"layers={self.layers!r} names no layers", "all, or numbers such as 0,2,5-7")
        layer_numbers(self.layers)
        if not self.window and (self.sinks or self.positions or self.layers != "all"):
            raise SnelloError("sinks, layers and positions belong to a window", "window=1024 is a good start")

    def plan(self, spec: Spec) -> Spec:
        """The exact spec of the result."""
        return convert(
            spec,
            window=self.window,
            sinks=self.sinks,
            layers=layer_numbers(self.layers),
            positions=self.positions,
            kv_heads=self.kv_heads,
        )

    def apply(self, model: Model, context: Context) -> Model:
        """Writes an ordinary checkpoint where a config can say the result, else a lean folder; looks at no text."""
        from snello.techniques.attention.apply import lighten

        return lighten(self, model, context)
