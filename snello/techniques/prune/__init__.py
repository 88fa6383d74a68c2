"""Prune: fewer channels, heads, hidden dimensions or layers, so that shapes really shrink. Options and plan.

`shapes` says exactly what remains; `calibrate` looks at text, `select` decides, `apply` writes. The last three are not
imported before `apply` runs, so that planning and explaining need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from snello.errors import SnelloError
from snello.models.spec import Spec
from snello.techniques.prune.shapes import shrink

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

LARGEST = 0.9


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove whole channels, heads, hidden dimensions or layers, chosen on calibration text; what is left is dense.

    Idea: zeros inside a matrix save no time on today's engines, a smaller matrix does everywhere. The result is an
    ordinary checkpoint that Transformers loads.

    Formula: a channel or head j matters by the energy it adds, tr(W_j G_jj W_j^T), G = X^T X of the inputs of `down` or
    `o`. What is removed is explained by what is kept, W' = W_K + W_R G_RK (G_KK + damping)^-1. A layer matters by its
    block influence, 1 - cos(in, out); a hidden dimension by the mean |normed activation| over all norms.

    When it hurts: without healing (a few steps of training) a quarter of the channels is much for a small model, and
    hidden width and layers cost most. Facts go before fluency. Measure, and heal.

    Papers: Minitron arXiv:2407.14679, FLAP arXiv:2312.11983, ShortGPT arXiv:2403.03853, LLM-Pruner arXiv:2305.11627.
    """

    ffn: float = field(default=0.25, metadata={"help": "Fraction of the feed-forward channels to remove; 0 keeps all."})
    heads: float = field(default=0.0, metadata={"help": "Fraction of the attention heads to remove, evenly by group."})
    width: float = field(default=0.0, metadata={"help": "Fraction of the hidden dimensions to remove, in all layers."})
    layers: float = field(default=0.0, metadata={"help": "Fraction of the layers to remove, least influence first."})
    compensate: bool = field(
        default=True, metadata={"help": "Let kept channels and heads take over from the removed by least squares."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.compensate, bool):
            raise SnelloError(f"compensate={self.compensate!r} is not an option of prune", "on or off: a bool")
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "compensate":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
                raise SnelloError(
                    f"{option.name}={value!r} is not a fraction in 0..{LARGEST}",
                    f"{option.name}=0.25 removes a quarter",
                )
        if not (self.ffn or self.heads or self.width or self.layers):
            raise SnelloError("prune was asked to remove nothing", "ffn=0.25 is a good start")

    def plan(self, spec: Spec) -> Spec:
        """The exact shapes of the result. Never removes more than asked: counts are rounded up to what runs well."""
        return shrink(spec, ffn=self.ffn, heads=self.heads, width=self.width, layers=self.layers)

    def apply(self, model: Model, context: Context) -> Model:
        """Writes an ordinary checkpoint at `context.output` and loads it."""
        from snello.techniques.prune.apply import prune

        return prune(self, model, context)
