"""Sparsify: set the weights that matter least to zero, in place. Options and plan; the work is in `apply`.

Masks, the repair of errors and the cut over a whole model stand in their own files of this folder; none that needs
torch is imported before `apply` runs. The result is the same model in its own number type with zeros in it: every other
technique, the engine and the exports take it as they take any model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from snello.errors import SnelloError, Unsupported
from snello.models.spec import INTEGER, Format, Spec, linear_shape
from snello.techniques.units import body_linears, check_plain_blocks

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

Method = Literal["magnitude", "wanda", "sparsegpt"]
Pattern = Literal["unstructured", "2:4", "4:8", "rows", "columns"]
Scope = Literal["row", "layer", "global"]

GROUPS = {"2:4": 4, "4:8": 8}  # of so many neighbours in a row, half are zero
LINES = {"rows": 0, "columns": 1}  # whole outputs or inputs of each linear, by dimension
SCOPES: dict[str, tuple[Scope, ...]] = {  # what a method can rank weights over; the first is its own
    "magnitude": ("layer", "row", "global"),
    "wanda": ("row", "layer"),
    "sparsegpt": ("layer",),
}


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Set a share of the weights to zero, and keep the model's shapes, number type and size.

    Idea: many weights of a trained model change its answers little. Which ones, a weight's size tells roughly, its size
    times the loudness of its input tells better, and the curvature of the layer's error also says how the others repair
    the loss.

    Formula: magnitude drops the smallest |w|; wanda the smallest |w[n, k]| * |x[k]|_2 in each row n, x the inputs on
    calibration text; sparsegpt the smallest w[n, k]^2 / U[k, k]^2 and then moves the columns to come by
    -w[n, k] U[k, k+1:] / U[k, k], U the upper Cholesky factor of the inverse of X^T X. 2:4 drops two of every four
    neighbours in a row, 4:8 four of eight; rows and columns are whole outputs or inputs, of the smallest |w|_2.
    Later layers are calibrated on what the pruned earlier ones give.

    When it hurts: nothing gets faster or smaller here. The zeros are stored and multiplied like all weights, so this is
    a study, or a start for what removes or retrains weights. Loss grows steeply above half; small models have less to
    spare, and 2:4 costs more than the same share chosen freely. Quantizing afterwards keeps exact zeros only with
    rtn or awq and rotate off; otherwise they become rounding noise.

    Papers: SparseGPT arXiv:2301.00774, Wanda arXiv:2306.11695, magnitude arXiv:1506.02626, N:M arXiv:2104.08378.
    """

    method: Method = field(
        default="magnitude",
        metadata={"help": "What ranks weights: magnitude needs no text, wanda and sparsegpt calibrate on it."},
    )
    sparsity: float = field(
        default=0.5, metadata={"help": "Share of the blocks' weights that become zero, between 0 and 1."}
    )
    pattern: Pattern = field(
        default="unstructured",
        metadata={"help": "Where zeros may lie: anywhere, half of each 4 or 8 neighbours, whole rows or columns."},
    )
    scope: Scope | None = field(
        default=None,
        metadata={
            "help": "Weights that are ranked together; unset is layer for magnitude and sparsegpt, row for wanda."
        },
    )

    def __post_init__(self) -> None:
        _check_choice("method", self.method, get_args(Method))
        _check_choice("pattern", self.pattern, get_args(Pattern))
        _check_choice("scope", self.scope, (None, *get_args(Scope)))
        if not isinstance(self.sparsity, float):
            raise SnelloError(f"sparsity={self.sparsity!r} is not a share", "sparsity=0.5 makes half of them zero")
        if not 0 < self.sparsity < 1:
            raise SnelloError(f"sparsity={self.sparsity} is not between 0 and 1", "sparsity=0.5 is a good start")
        if self.scope is not None and self.scope not in SCOPES[self.method]:
            able = ", ".join(SCOPES[self.method])
            raise SnelloError(f"{self.method} cannot rank weights by scope={self.scope!r}", f"choose from: {able}")
        if self.group and self.sparsity != 0.5:
            raise SnelloError(
                f"pattern {self.pattern} makes half of the weights zero, not sparsity={self.sparsity}",
                "leave sparsity out, or use pattern='unstructured'",
            )
        if self.pattern != "unstructured" and self.scope is not None:
            hint = "each group ranks its own weights" if self.group else "each linear ranks its own rows or columns"
            raise SnelloError(f"scope={self.scope!r} has no meaning with pattern {self.pattern}", hint)
        if self.pattern in LINES and self.method != "magnitude":
            raise SnelloError(
                f"{self.method} ranks single weights, not whole {self.pattern}",
                "use method='magnitude', or `snello apply prune`, which removes them",
            )

    @property
    def group(self) -> int:
        """Neighbours of which half are zero; 0: zeros may lie anywhere."""
        return GROUPS.get(self.pattern, 0)

    @property
    def ranked_over(self) -> Scope:
        """The scope, the method's own where none was chosen."""
        return SCOPES[self.method][0] if self.scope is None else self.scope

    def plan(self, spec: Spec) -> Spec:
        """The same spec: zeros change neither shapes nor bytes."""
        if any(_is_packed(format) for format in (spec.default_format, *dict(spec.formats).values())):
            raise Unsupported("this model is quantized already", "sparsify the original, then quantize the result")
        check_plain_blocks(spec, "sparsify")
        for linear in body_linears(spec):
            columns = linear_shape(spec, linear)[1]
            if self.group and columns % self.group:
                raise Unsupported(
                    f"{linear} has {columns} input columns, no multiple of {self.group}", "use pattern='unstructured'"
                )
        return spec

    def apply(self, model: Model, context: Context) -> Model:
        """Writes a folder in the model's own number type at `context.output` and loads it."""
        from snello.techniques.sparsify.apply import sparsify

        return sparsify(self, model, context)


def _is_packed(format: Format) -> bool:
    return format.weights in INTEGER or format.rotate or format.equalize


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        listed = ", ".join(str(choice) for choice in choices if choice is not None)
        raise SnelloError(f"{name}={value!r} is not an option of sparsify", f"choose from: {listed}")
