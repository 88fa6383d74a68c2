"""Distill: a smaller model learns from a larger one, or a pruned one is healed by its original. Options and plan.

`mix` reads which losses count how much; `losses` are those losses, one small function each; `pair` checks that teacher
and student fit before anything is read; `apply` trains and writes. Only the first two stand here without torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from snello.errors import SnelloError, Unsupported
from snello.models.spec import Attention, Spec
from snello.techniques.distill.mix import parse_mix
from snello.techniques.units import check_plain_blocks
from snello.training.options import check_choice, check_positive

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context

StudentKind = Literal["given", "alternate"]


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a smaller model to answer as a larger one does: the one given (to heal it), or every other layer of it.

    Idea: what a teacher says about every word of the vocabulary teaches more than the one word that the text has. So a
    pruned model gets much of its quality back from far less text than it was trained on.

    Formula: forward is KL(p || q), p the teacher and q the student, both at temperature t, times t^2; reverse is
    KL(q || p); jensen is the mean of both to (p + q) / 2. With top_k, p and q are the teacher's k likeliest words and
    the rest as one. text is the loss of the text itself (next or masked words), cosine 1 - cos of the last hidden rows,
    mse that of all layers' rows, relations the KL between the softmaxed products of queries, keys and values with
    themselves. They are added with weights. With on_policy, that share of the rows is what the student itself says to
    their first quarter, scored by the teacher.

    When it hurts: on text unlike the model's work it forgets the rest. On little text it learns that by heart; beyond
    one pass say so to yourself. A model that trains anyhow may gain from text alone: a control tells.

    Papers: Hinton arXiv:1503.02531, DistilBERT arXiv:1910.01108, MiniLMv2 arXiv:2012.15828, TinyBERT arXiv:1909.10351,
    MiniLLM arXiv:2306.08543, GKD arXiv:2306.13649, Minitron arXiv:2407.14679.
    """

    teacher: str | None = field(
        default=None, metadata={"help": "Folder or name of the teacher; none takes the original of the ladder."}
    )
    student: StudentKind = field(
        default="given", metadata={"help": "Who learns: the given model, or alternate: every other layer of it."}
    )
    loss: str = field(
        default="forward",
        metadata={"help": "Losses and their weights, as in forward:5,text:2,cosine:1 (DistilBERT's)."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Softens both sides of forward, reverse and jensen; 1 does not."}
    )
    top_k: int = field(
        default=0, metadata={"help": "Compare the teacher's likeliest words and the rest as one; 0: all."}
    )
    tokens: int = field(default=1_000_000, metadata={"help": "Tokens to train on; text that is shorter is repeated."})
    rate: float = field(default=5e-4, metadata={"help": "The largest learning rate, after a twentieth of the steps."})
    batch_tokens: int = field(default=4096, metadata={"help": "Tokens in one update of the weights, about."})
    recompute: bool = field(
        default=False, metadata={"help": "Compute blocks again for the gradient: less memory, a third more time."}
    )
    on_policy: float = field(
        default=0.0, metadata={"help": "Share of rows that the student goes on with itself, 0 to 1; decoders only."}
    )

    def __post_init__(self) -> None:
        parse_mix(self.loss)
        check_choice("student", self.student, get_args(StudentKind))
        for name in ("temperature", "rate"):
            check_positive(name, getattr(self, name))
        for name, least in (("top_k", 0), ("tokens", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SnelloError(f"{name}={value!r} is not a whole number of at least {least}", f"leave {name} out")
        share = self.on_policy
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise SnelloError(f"on_policy={share!r} is not a share from 0 to 1", "on_policy=0.5 is half of the rows")
        if share and set(parse_mix(self.loss)) == {"text"}:
            raise SnelloError("on_policy with loss=text: nobody scores what the student says", "loss=reverse does")
        if not isinstance(self.recompute, bool):
            raise SnelloError(f"recompute={self.recompute!r} is not an option of distill", "on or off: a bool")
        if self.teacher is not None and not isinstance(self.teacher, str):
            raise SnelloError(f"teacher={self.teacher!r} is not a folder or a name", 'teacher="path/of/the/original"')

    def plan(self, spec: Spec) -> Spec:
        """The spec of the student."""
        check_plain_blocks(spec, "distill", convolutions=True)
        if "relations" in parse_mix(self.loss) and not isinstance(spec.layers[-1].mixer, Attention):
            raise Unsupported(
                "distill: relations are those of attention, and the last layer convolves", "leave relations out of loss"
            )
        if spec.task == "embedding":
            hint = "distill the checkpoint as it was trained (masked words or labels)"
            raise Unsupported("distill: an embedding model", hint)
        if self.on_policy and not spec.causal:
            raise Unsupported(f"distill: a {spec.task} model writes nothing", "leave on_policy out")
        if spec.task == "sequence-classification" and "text" in parse_mix(self.loss):
            raise Unsupported("distill: text has no labels to train a classifier on", "leave text out of loss")
        if spec.formats or spec.cache_format != spec.default_format.weights:
            raise Unsupported("distill: this model mixes number formats", "distill first, then quantize")
        if self.student == "given":
            return spec
        if len(spec.layers) < 2:
            raise Unsupported("distill: every other layer of this model, which has one", "leave student out: given")
        if set(spec.layers) != {spec.layers[0]}:
            raise Unsupported("distill: every other layer of this model", "models with equal layers are supported")
        return dataclasses.replace(spec, layers=spec.layers[::2])

    def control(self, spec: Spec) -> Distill | None:
        """The original on the same tokens, schedule and seed, with what the text says as its only teacher."""
        if spec.task == "sequence-classification":
            return None
        return dataclasses.replace(self, teacher=None, student="given", loss="text", on_policy=0.0)

    def apply(self, model: Model, context: Context) -> Model:
        """Writes an ordinary checkpoint at `context.output` and loads it."""
        from snello.techniques.distill.apply import distill

        return distill(self, model, context)
