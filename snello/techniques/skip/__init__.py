"""Skip: small inputs of the blocks' linears count as zero, and the weights they meet are not read. Options and plan.

`shares` decides how much each input skips, `apply` measures and writes. Both need torch and are not imported before
`apply` runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from snello.errors import SnelloError, Unsupported
from snello.models.spec import Format, Spec, linear_shape
from snello.native.core import MAX_CHANNELS
from snello.techniques.units import body_linears, check_plain_blocks

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

Shares = Literal["greedy", "uniform"]
Rank = Literal["weighted", "magnitude"]
LEAST, LARGEST = 0.001, 0.9  # a spec states thousandths


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Prune at run time: the smallest values of every linear's input are taken for zero, whatever the text is.

    Idea: decoding one stream waits for weights. A channel whose input is zero need not be read, and in a row of hidden
    values many are small. So a threshold for each input is measured on calibration text; the weights are stored channel
    by channel, and the channels that stay are gathered.

    Formula: x'_k = 0 where |x'_k| < t_k, x' the input in the basis in which it is quantized; the rest is rounded as
    before. magnitude (TEAL): t_k = t, the quantile of |x'|. weighted (WINA): t_k = t / |w_k|, |w_k| the norm of the
    weights that read channel k. Shares are uniform, or greedy: each step goes to the input that loses the least part
    of its energy for the bytes that it saves.

    When it hurts: nothing is gained where weights are read for many rows anyway (prompts, batches, verified drafts): a
    channel is skipped if all rows skip it. Small models have little to spare, least of all in a rotated basis, in which
    no channel is quiet. Files stay as large.

    Papers: TEAL arXiv:2408.14690, WINA arXiv:2505.19427, CATS arXiv:2404.08763.
    """

    share: float = field(default=0.25, metadata={"help": "Part of the inputs' values that becomes zero, 0.001 to 0.9."})
    shares: Shares = field(
        default="uniform",
        metadata={"help": "How the share is spread over inputs: uniform, or greedy where it costs least."},
    )
    rank: Rank = field(
        default="weighted",
        metadata={"help": "What is small: weighted by the weights that read it, or magnitude alone."},
    )

    def __post_init__(self) -> None:
        for name, kind in (("shares", Shares), ("rank", Rank)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise SnelloError(
                    f"{name}={value!r} is not an option of skip", f"choose from: {', '.join(get_args(kind))}"
                )
        if not isinstance(self.share, float) or not LEAST <= self.share <= LARGEST:
            raise SnelloError(f"share={self.share!r} is not in {LEAST}..{LARGEST}", "share=0.25 skips a quarter")

    def plan(self, spec: Spec) -> Spec:
        """Formats that skip, every input alike; `apply` may spread the share otherwise."""
        check_plain_blocks(spec, "skip")
        formats = {linear: spec.format(linear) for linear in body_linears(spec)}
        if any(form.skip for form in formats.values()):
            raise Unsupported("this model skips already", "start from the model that skip was applied to")
        fitting = {linear: form for linear, form in formats.items() if _is_integer(form)}
        if not fitting:
            hint = "quantize it first: snello apply quantize MODEL -o DIR"
            raise Unsupported("skip works on quantized weights and activations, and this model has none", hint)
        for linear in fitting:
            columns = linear_shape(spec, linear)[1]
            if columns > MAX_CHANNELS:
                raise Unsupported(
                    f"{linear} has {columns} input columns, by channel {MAX_CHANNELS} can be stored",
                    "use a narrower model",
                )
        share = round(self.share, 3)
        return spec.with_formats({linear: dataclasses.replace(form, skip=share) for linear, form in fitting.items()})

    def apply(self, model: Model, context: Context) -> Model:
        """Writes a lean folder at `context.output` and loads it."""
        from snello.techniques.skip.apply import skip

        return skip(self, model, context)


def _is_integer(form: Format) -> bool:
    return form.weights in ("int8", "int4") and form.activations != "float"
