"""Trim: fewer words. Options and plan; the tokenizer is rewritten and every text can still be written.

`vocabulary` says which tokens stay, `rewrite` makes the tokenizer's files anew, `apply` gathers rows; none of them is
imported before `apply` runs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from snello.errors import SnelloError, Unsupported
from snello.models.spec import INTEGER, Spec
from snello.techniques.units import check_plain_blocks

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

LEAST = 8  # fewer tokens than this are a slip of the pen, not a vocabulary


@dataclass(frozen=True, kw_only=True)
class Trim:
    """Keep the tokens that a use needs; rare ones are written with smaller pieces that stay.

    Idea: the head multiplies a row for every word of the vocabulary at every token, in a small model with a large one
    much of all weights, and one use needs a part of them. The result is an ordinary checkpoint with its own tokenizer.

    Formula: kept = single bytes (or characters), special and added tokens, all that calibration text holds at least
    min_count times, each with the pieces that its merges go through, then the earliest merges until `keep` is reached.
    Rows W' = W[kept]. A text whose tokens all stay is encoded as before; a token that left becomes what the kept merges
    make of it, so P(token) = P(piece 1) P(piece 2 | piece 1) ...

    When it hurts: text unlike the calibration text takes more tokens, each of which the model has seldom seen so cut,
    and it can no longer answer with a word that left in one step. Other languages suffer first.

    Papers: Ushio et al. arXiv:2305.15020 (trimming), Bogoychev et al. arXiv:2311.09709 (its ups and downs).
    """

    counted_tokens: ClassVar[int] = 4_000_000  # counting is cheap, and what was not counted leaves

    keep: float = field(
        default=0.5, metadata={"help": "How much of the vocabulary stays: a share below 1, or a number of tokens."}
    )
    min_count: int = field(
        default=1, metadata={"help": "Tokens that calibration text holds at least so often are sure to stay."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep < math.inf:
            raise SnelloError(f"keep={self.keep!r} is no share and no number of tokens", "keep=0.5, or keep=32000")
        if self.keep >= 1 and (self.keep != int(self.keep) or self.keep < LEAST):
            raise SnelloError(f"keep={self.keep:g} keeps no part of a vocabulary", "keep=0.5, or keep=32000 tokens")
        if isinstance(self.min_count, bool) or not isinstance(self.min_count, int) or self.min_count < 1:
            raise SnelloError(f"min_count={self.min_count!r} is not a whole number above zero", "min_count=1")

    def plan(self, spec: Spec) -> Spec:
        """The exact size of the vocabulary. The tokens that the spec names come last, in their order."""
        count = self._count(spec)
        new = {old: count - len(named(spec)) + place for place, old in enumerate(named(spec))}
        return dataclasses.replace(
            spec,
            vocab_size=count,
            bos_token=None if spec.bos_token is None else new[spec.bos_token],
            eos_tokens=tuple(new[token] for token in spec.eos_tokens),
            pad_token=None if spec.pad_token is None else new[spec.pad_token],
        )

    def apply(self, model: Model, context: Context) -> Model:
        """Writes an ordinary checkpoint at `context.output` and loads it."""
        from snello.techniques.trim.apply import trim

        return trim(self, model, context)

    def _count(self, spec: Spec) -> int:
        check_plain_blocks(spec, "trim")
        formats = [spec.default_format, *dict(spec.formats).values()]
        if any(format.weights in INTEGER for format in formats):
            raise Unsupported("trim: this model is quantized", "trim the original, then quantize")
        if spec.head.kind == "embed":
            raise Unsupported("trim: models for embedding are not supported", "prune makes them smaller")
        count = math.ceil(self.keep * spec.vocab_size) if self.keep < 1 else int(self.keep)
        if count >= spec.vocab_size:
            hint = f"give keep below 1, or below {spec.vocab_size} tokens"
            raise Unsupported(f"keep={self.keep:g} leaves out none of {spec.vocab_size} tokens", hint)
        return count


def named(spec: Spec) -> list[int]:
    """The ids that the spec names, ascending."""
    ids = {spec.bos_token, *spec.eos_tokens, spec.pad_token} - {None}
    return sorted(token for token in ids if token is not None)
