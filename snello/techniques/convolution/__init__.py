"""Convolution: gated short convolutions in the place of the attention that matters least. Options and plan.

`conversion` says exactly what becomes of a spec, `fit` solves for the weights of one layer, `apply` writes them. The
last two are not imported before `apply` runs, so that planning and explaining need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snello.errors import SnelloError
from snello.models.spec import MAX_KERNEL, Spec
from snello.techniques.convolution.conversion import LEAST, LEAST_KEPT, convert, named_layers

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Replace the attention that matters least by gated convolutions over the last few positions.

    Idea: much attention looks at its nearest neighbours. A convolution over the last `kernel` positions does that
    without keys and values: a few rows of state for each page of the cache, and no work that grows with the text. At
    least a quarter of the layers keeps its attention, which alone can recall what was said far back.

    Formula: o(c(y) * conv(b(y) * x(y))). It begins as the linear map of the last rows that explains most of what
    attention added on calibration text, min |A - sum_j Y_(p-j) M_j|^2, cut to its D strongest channels; the gates b and
    c begin at 1 and are for healing to learn. Attention of least influence goes first: 1 - cos(x, x + attention(x)).

    When it hurts: unhealed always, and recall from afar stays worse. It has 4 D^2 weights, more than attention with few
    key-value heads: at short texts a step can even be slower. Heal with `distill`, and measure.

    Papers: LFM2 arXiv:2511.23404, Hyena arXiv:2302.10866, ShortGPT arXiv:2403.03853.
    """

    keep: float = field(
        default=0.5, metadata={"help": "Fraction of the layers that keep their attention, at least a quarter."}
    )
    kernel: int = field(default=3, metadata={"help": "Positions that a convolution sees, its own included; 2 to 8."})
    layers: str = field(
        default=LEAST,
        metadata={"help": "Which layers convolve: least (of least influence), or numbers such as 0,2,5-7."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not LEAST_KEPT <= self.keep < 1:
            raise SnelloError(
                f"keep={self.keep!r} is not a fraction from {LEAST_KEPT} to below 1",
                "keep=0.5 leaves half of the layers their attention",
            )
        if type(self.kernel) is not int or not 2 <= self.kernel <= MAX_KERNEL:
            raise SnelloError(f"kernel={self.kernel!r} is not a count from 2 to {MAX_KERNEL}", "kernel=3 is usual")
        if not isinstance(self.layers, str):
            raise SnelloError(f"layers={self.layers!r} names no layers", "least, or numbers such as 0,2,5-7")
        named_layers(self.layers)

    def plan(self, spec: Spec) -> Spec:
        """How many layers convolve. Which, where text decides, is not known yet: the plan then names the last ones."""
        return convert(spec, keep=self.keep, kernel=self.kernel, layers=named_layers(self.layers))

    def apply(self, model: Model, context: Context) -> Model:
        """Writes an LFM2 at `context.output` where that says the result, else a folder of our own, and loads it."""
        from snello.techniques.convolution.apply import replace_attention

        return replace_attention(self, model, context)
