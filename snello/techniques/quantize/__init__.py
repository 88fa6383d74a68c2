"""Quantize: fewer bits per weight, integer activations, an INT8 cache. Options and plan; the work is in `apply`.

The rounding, the basis it happens in, and each method stand in their own files of this folder; none of them is imported
before `apply` runs, so that planning and explaining need no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from snello.errors import SnelloError, Unsupported
from snello.models.spec import INTEGER, Format, Spec, linear_names, linear_shape, own_format
from snello.techniques.quantize.size import parse_budget, plan_budget
from snello.techniques.units import body_linears, check_plain_blocks

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

Weights = Literal["int4", "int3", "int8", "mixed", "bf16", "fp16"]
Method = Literal["rtn", "hqq", "gptq", "awq", "smoothquant"]
GroupSize = Literal[0, 32, 64, 128]
Scales = Literal["group", "row"]
ROW_STORED: Literal[128] = 128  # the groups in which rows with one scale are stored
Activations = Literal["int8", "int8-static", "float"]
HeadWeights = Literal["int8", "int4", "float"]

FITS: dict[Method, tuple[Weights, ...]] = {  # the weights that a method has something to say about
    "rtn": get_args(Weights),
    "hqq": ("int4", "int3", "mixed"),
    "gptq": ("int4", "int3", "int8", "mixed"),
    "awq": ("int4", "int3", "int8", "mixed"),
    "smoothquant": ("int8",),
}
DATA_FREE: tuple[Method, ...] = ("rtn", "hqq")
ALPHA = 0.5
MAX_COLUMNS = 131_072  # the exact int32 sum over K holds up to here


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Store each weight as a small integer times a scale, and multiply integers.

    Idea: decoding waits for weights to arrive from memory, so 4 bits instead of 16 is close to 4 times the speed; with
    8-bit activations the products are integer too, which is what makes prompts and batches fast.

    Formula: INT4 w = r[n] * s[n, k/g] * (q - 8), q in 0..15, s in 1..15 per group of g, r per row; INT3 the same with
    q - 4, q in 0..7, and s in -15..15; INT8 w = r[n] * q.
    Weights are rounded in the basis W diag(s) H (equalize, then a Hadamard rotation), in which no channel stands out;
    the input is brought there once, x' = H (x / s). `rtn` takes the nearest integer; `gptq` rounds column by column and
    lets later columns repair the errors of earlier ones on calibration text; `awq` searches the s that loses least.
    `hqq` moves r and s[n, g] to lessen the sum of |error|^0.7 instead of its square, without text; `smoothquant`, for
    INT8, takes s = max|X|^alpha / max|W|^(1 - alpha) per channel, from calibration text. Static activations have one
    scale per input, the largest magnitude in calibration text / 127. bf16 and fp16 are casts; inputs of BF16 linears
    are rounded to BF16 too, but with float activations. Experts are calibrated on the rows that the router sends them.

    When it hurts: small models and narrow layers have little room, INT4 without calibration costs them most; tasks that
    hang on exact recall suffer before the average loss shows it; INT3 loses more than INT4. HQQ trades
    squared error for its own and mostly loses by it. Inputs louder than any calibrated are cut to a static scale's
    range. FP16 ends at 65,504: a checkpoint with larger weights is refused.

    Papers: GPTQ arXiv:2210.17323, AWQ arXiv:2306.00978, SmoothQuant arXiv:2211.10438, QuaRot arXiv:2404.00456, HQQ
    https://mobiusml.github.io/hqq_blog (Badri and Shaji, 2023).
    """

    weights: Weights = field(
        default="int4",
        metadata={"help": "Bits of the linears: int4, int3, int8, mixed (see budget), or a cast to bf16 or fp16."},
    )
    method: Method = field(
        default="rtn",
        metadata={
            "help": "How integers are chosen: rtn and hqq need no text, gptq, awq and smoothquant calibrate on it."
        },
    )
    group_size: GroupSize = field(
        default=128,
        metadata={
            "help": "Columns that share a scale in INT4 and INT3; fewer are finer, a little larger; 0: a whole row."
        },
    )
    activations: Activations = field(
        default="int8",
        metadata={
            "help": "Linears' inputs at run time: int8 by row, int8-static by one calibrated scale, float slower."
        },
    )
    rotate: bool = field(
        default=True, metadata={"help": "Round in a Hadamard basis, which spreads outlier channels over their block."}
    )
    equalize: bool = field(
        default=True,
        metadata={"help": "Balance input channels against their weights first, which tames outlier channels."},
    )
    cache: Literal["int8"] | None = field(
        default=None, metadata={"help": "Type of cached keys and values; unset keeps the model's own."}
    )
    head: HeadWeights = field(
        default="int8", metadata={"help": "Type of the output head and token embedding; float keeps the model's own."}
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "With mixed: 5 bits (a weight, on average), 40% (of the bytes), 300MB (in all) or 1% loss."},
    )
    alpha: float = field(
        default=ALPHA,
        metadata={"help": "With smoothquant: how much of the inputs' range moves into the weights, 0 to 1."},
    )

    def __post_init__(self) -> None:
        choices = {
            "weights": Weights,
            "method": Method,
            "group_size": GroupSize,
            "activations": Activations,
            "scales": Scales,
        }
        for name, kind in {**choices, "head": HeadWeights}.items():
            _check_choice(name, getattr(self, name), get_args(kind))
        _check_choice("cache", self.cache, (None, "int8"))
        for name in ("rotate", "equalize"):
            if not isinstance(getattr(self, name), bool):
                raise SnelloError(f"{name}={getattr(self, name)!r} is not an option of quantize", "on or off: a bool")
        if self.weights == "mixed":
            parse_budget(self.budget)
        elif self.budget is not None:
            raise SnelloError(
                f"budget={self.budget!r} has no meaning with weights={self.weights!r}", "use weights='mixed'"
            )
        self._check_method()

    def _check_method(self) -> None:
        """What a method has no use for is said, not ignored."""
        if self.group_size == 0 and self.weights not in ("int4", "int3"):
            raise SnelloError(
                f"group_size=0 has no meaning with weights={self.weights!r}", "use weights='int4' or 'int3'"
            )
        if self.weights not in FITS[self.method]:
            fitting = " or ".join(repr(weights) for weights in FITS[self.method])
            raise SnelloError(
                f"method={self.method!r} has nothing to do with weights={self.weights!r}",
                f"use weights={fitting}, or method='rtn'",
            )
        if self.method == "smoothquant" and self.activations == "float":
            raise SnelloError("smoothquant prepares inputs for 8 bits, and activations are float", "activations='int8'")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise SnelloError(f"alpha={self.alpha!r} is not between 0 and 1", "alpha=0.5 is where the paper starts")
        if self.method != "smoothquant" and self.alpha != ALPHA:
            raise SnelloError(f"alpha={self.alpha} has no meaning with method={self.method!r}", "use smoothquant")

    @property
    def scales(self) -> Scales:
        """Whether each group has a scale of its own; rows with one scale are stored as groups with equal ones."""
        return "group" if self.group_size else "row"

    @property
    def calibrates(self) -> bool:
        """Whether `apply` looks at text to choose integers or scales."""
        return self.method not in DATA_FREE or self.activations == "int8-static"

    def plan(self, spec: Spec) -> Spec:
        """Formats and cache type of the result. With mixed: one way to spend the budget; `apply` finds a better one."""
        _check_spec(spec)
        check_plain_blocks(spec, "quantize", self._without_experts(), convolutions=True)
        spec = dataclasses.replace(spec, cache_format=self.cache) if self.cache else spec
        if self.weights == "bf16" or self.weights == "fp16":
            plain = Format(weights=self.weights) if self.activations == "float" else own_format(self.weights)
            return dataclasses.replace(spec, default_format=plain)
        ladder = self.ladder(spec)
        formats = dict.fromkeys(body_linears(spec), ladder[0])
        planned = spec.with_formats(formats | self._head_formats(spec))
        return planned if self.budget is None else plan_budget(spec, planned, ladder, parse_budget(self.budget))

    def ladder(self, spec: Spec) -> list[Format]:
        """The formats that a linear of the blocks can get, from few bits to many: one, but with mixed."""
        if self.weights == "mixed":
            return [*(self.format(weights) for weights in ("int3", "int4", "int8")), spec.default_format]
        assert self.weights == "int8" or self.weights == "int4" or self.weights == "int3"
        return [self.format(self.weights)]

    def _without_experts(self) -> str | None:
        """What to do instead where there are experts, which the core runs with one format and scales by row."""
        if self.weights == "mixed":
            return "with experts, weights are int4, int3 or int8 throughout"
        return "with experts, use activations='int8' or 'float'" if self.activations == "int8-static" else None

    def apply(self, model: Model, context: Context) -> Model:
        """Writes a lean folder at `context.output` and loads it."""
        from snello.techniques.quantize.apply import quantize

        return quantize(self, model, context)

    def format(self, weights: Literal["int8", "int4", "int3"]) -> Format:
        """The format of a linear that gets these integer weights."""
        equalize = self.equalize or self.method in ("awq", "smoothquant")
        group = 0 if weights == "int8" else self.group_size or ROW_STORED
        return Format(
            weights=weights, group_size=group, activations=self.activations, rotate=self.rotate, equalize=equalize
        )

    def _head_formats(self, spec: Spec) -> dict[str, Format]:
        """The vocabulary's two sides, and BERT's dense layers in front; a classifier's few rows keep their type."""
        if self.head == "float":
            return {}
        linears = [name for name in linear_names(spec) if name.startswith("head.")]
        formats = {name: self._head_format("int8") for name in linears}
        if spec.head.kind == "lm":
            formats["head"] = self._head_format(self.head)
        if not (spec.head.kind == "lm" and spec.head.tied):
            formats["embedding"] = Format(weights="int8")
        return formats

    def _head_format(self, weights: Literal["int8", "int4"]) -> Format:
        """Activations by row also where the blocks' are static: few rows come here, and all of them are answers."""
        format = self.format(weights)
        return format if format.activations == "float" else dataclasses.replace(format, activations="int8")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        listed = ", ".join(str(choice) for choice in choices)
        raise SnelloError(f"{name}={value!r} is not an option of quantize", f"choose from: {listed}")


def _check_spec(spec: Spec) -> None:
    if any(format.weights in INTEGER for format in (spec.default_format, *dict(spec.formats).values())):
        raise Unsupported("this model is quantized already", "start from the original, which still has all its bits")
    for linear in linear_names(spec):
        columns = linear_shape(spec, linear)[1]
        if columns > MAX_COLUMNS:
            raise Unsupported(
                f"{linear} has {columns} input columns, integer sums hold {MAX_COLUMNS}",
                "cast to weights='bf16' instead",
            )
