"""Do teacher, student and text fit each other? Everything that can be refused is, before weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.overlap import ngrams, seen_ngrams
from snello.models.spec import Attention, Spec
from snello.techniques.calibration import Windows, check_fit
from snello.techniques.distill.mix import NEEDS_SAME_WIDTH, parse_mix

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.distill import Distill

COUNTED = 200  # windows that share text are counted no further


def find_teacher(options: Distill, model: Model, context: Context) -> Model | None:
    """The model named by `teacher`, else the original of the ladder, else the whole of what becomes a smaller student.

    None where nobody is asked: the text alone teaches.
    """
    if set(parse_mix(options.loss)) == {"text"}:
        return None
    if options.teacher is not None:
        from snello.models import load

        return load(options.teacher)
    if context.original is not None:
        return context.original
    if options.student == "alternate":
        return model
    hint = "--teacher ORIGINAL, or --student alternate to make a smaller model of this one"
    raise SnelloError(f"{model.name} has no teacher: it would learn to be itself", hint)


def check_pair(options: Distill, student: Model, spec: Spec, teacher: Model) -> None:
    """The same words on both sides, and hidden rows that can be compared where a loss compares them.

    Raises:
        Unsupported: they do not fit.
    """
    if teacher.digest == student.digest and options.student == "given":
        raise Unsupported(f"{teacher.name} is its own teacher: nothing can be learned", "give a smaller student")
    if teacher.spec.task != spec.task:
        raise Unsupported(f"the teacher is a {teacher.spec.task} model, the student {spec.task}", "they must be alike")
    if teacher.spec.vocab_size != spec.vocab_size or teacher.tokenizer.digest != student.tokenizer.digest:
        sizes = f"{teacher.spec.vocab_size:,} and {spec.vocab_size:,} words"
        raise Unsupported(f"teacher and student have different vocabularies ({sizes})", "use a teacher of its family")
    if spec.task == "sequence-classification" and len(teacher.spec.head.labels) != len(spec.head.labels):
        raise Unsupported("teacher and student have different labels", "use a teacher of the same task")
    if "relations" in parse_mix(options.loss) and not isinstance(teacher.spec.layers[-1].mixer, Attention):
        message = f"relations are those of attention, and the last layer of {teacher.name} convolves"
        raise Unsupported(message, "leave relations out of loss")
    compared = sorted(NEEDS_SAME_WIDTH & set(parse_mix(options.loss)))
    if compared and teacher.spec.hidden_size != spec.hidden_size:
        widths = f"{teacher.spec.hidden_size} and {spec.hidden_size}"
        raise Unsupported(f"{compared[0]} compares hidden rows of {widths} dimensions", "loss=relations does not")


def check_text(student: Model, teacher: Model | None, context: Context) -> None:
    """Text that both can read, and none of what will judge the result.

    Raises:
        SnelloError: there is none, it does not fit, or it overlaps with what is held out.
    """
    for model in (student, *((teacher,) if teacher is not None else ())):
        check_fit(model, context.windows, use="train")
    if max(map(len, context.windows)) < 2:
        raise SnelloError("every text is a single token", "give longer text")
    shared = overlapping(context.windows, context.held_out)
    if shared:
        more = "at least " if shared == COUNTED else ""
        message = f"{more}{shared} of {len(context.windows)} training windows share 13 tokens in a row with the proof"
        raise SnelloError(message, "a model must not be trained on what judges it: take that text out")


def overlapping(windows: Windows, held_out: Windows) -> int:
    seen = seen_ngrams([np.asarray(window) for window in held_out])
    count = 0
    for window in windows if len(seen) else ():
        count += bool(np.isin(ngrams(window), seen).any())
        if count == COUNTED:
            break
    return count
