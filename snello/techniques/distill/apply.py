"""Trains a student on its teacher's answers and writes it as an ordinary checkpoint.

Both models are whole in memory: the student in FP32, which is what is trained, the teacher in the type that its
products are computed in. The teacher answers each batch as it comes; nothing of it is stored.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.errors import Unsupported
from snello.models import load
from snello.models.fewer_layers import FewerLayers
from snello.models.plain_folder import check_free, shaped_config, write_plain_folder
from snello.models.reference import Reference
from snello.models.spec import Spec
from snello.techniques.distill.lesson import Lesson
from snello.techniques.distill.mix import parse_mix
from snello.techniques.distill.pair import check_pair, check_text, find_teacher
from snello.techniques.distill.rollouts import REFRESH, OnPolicyRows, StudentWeights
from snello.training.data import Batches, LikeLengths, MaskedRows, Rows
from snello.training.loop import Trained, attention_for, train
from snello.training.options import TrainOptions

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.distill import Distill

WARMUP_SHARE = 0.05
LOGITS_BYTES = 1 << 27  # of FP32 logits at a time; a larger batch is cut into pieces
NEVER_HIDDEN = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token", "mask_token")


def distill(options: Distill, model: Model, context: Context) -> Model:
    planned = options.plan(model.spec)
    teacher = find_teacher(options, model, context)
    check_free(context.output)
    shaped_config(model, planned)  # what no config can say fails before time is spent
    check_text(model, teacher, context)
    if teacher is not None:
        check_pair(options, model, planned, teacher)
    rows = training_rows(options, model, context)
    student = _student(options, model, planned)
    folder = context.work_dir or context.output.with_name(f".{context.output.name}.training")
    batches = _batches(options, rows, student, model, planned, context, folder)
    lesson = Lesson.of(options, planned, None if teacher is None else Reference.from_model(teacher))
    _tell_passes(options, rows, context)
    how = train_options(options, planned, rows, context)
    with attention_for(max(map(len, rows.rows))):
        past = taught_by(options, teacher)
        done = train(student, batches, lesson, how, progress=context.progress, checkpoint_dir=folder, past=past)
    entry = _entry(options, context, done, teacher)
    values = StudentWeights(student).values
    write_plain_folder(context.output, planned, model, (*model.history, entry), values)
    shutil.rmtree(folder, ignore_errors=True)
    return load(context.output)


def training_rows(options: Distill, model: Model, context: Context) -> Rows:
    """The text as rows of a batch; masked anew at every step for a model of masked words.

    A classifier's texts are examples, not cut from anything longer: those of like lengths are read together.
    """
    length = sum(map(len, context.windows)) / len(context.windows)
    batch = max(1, round(options.batch_tokens / length))
    mask = model.tokenizer.mask_token if model.spec.task == "masked-lm" else None
    if mask is None:
        if model.spec.task == "masked-lm" and "text" in parse_mix(options.loss):
            raise Unsupported(f"the tokenizer of {model.name} has no mask token", "leave text out of loss")
        kind = LikeLengths if model.spec.task == "sequence-classification" else Rows
        return kind(context.windows, min(batch, len(context.windows)), context.seed)
    named = (model.tokenizer.special_tokens.get(name) for name in NEVER_HIDDEN)
    kept = {model.tokenizer.token_id(text) for text in named if text is not None}
    return MaskedRows(
        context.windows,
        batch,
        context.seed,
        mask_token=mask,
        vocab_size=model.spec.vocab_size,
        keep=frozenset(token for token in kept if token is not None),
    )


def _batches(
    options: Distill, rows: Rows, student: Reference, model: Model, spec: Spec, context: Context, folder: Path
) -> Batches:
    """The text's rows, or some of them gone on with by the student."""
    if not options.on_policy:
        return rows
    return OnPolicyRows(
        rows,
        student,
        model,
        spec,
        share=options.on_policy,
        refresh=REFRESH,
        folder=folder,
        threads=context.threads,
        tell=lambda message: context.progress(message, 0.0),
    )


def train_options(options: Distill, spec: Spec, rows: Rows, context: Context) -> TrainOptions:
    """The loop's options; pieces are as small as the logits of one may be, by the spec alone."""
    steps = max(1, round(options.tokens / rows.tokens_per_step))
    answers = rows.tokens_per_step if spec.head.kind == "lm" else rows.batch
    return TrainOptions(
        steps=steps,
        rate=options.rate,
        warmup_steps=round(WARMUP_SHARE * steps),
        seed=context.seed,
        accumulate=min(rows.batch, math.ceil(answers * spec.vocab_size * 4 / LOGITS_BYTES)),
        recompute=options.recompute,
        threads=context.threads,
    )


def taught_by(options: Distill, teacher: Model | None) -> str:
    """Names the loss: what is compared, how, and with whom."""
    taught = None if teacher is None else teacher.digest
    return f"{parse_mix(options.loss)} {options.temperature} {options.top_k} {taught}"


def _student(options: Distill, model: Model, planned: Spec) -> Reference:
    if options.student == "given":
        return Reference.from_weights(planned, model.weights)
    return Reference.from_weights(planned, FewerLayers(model.weights, range(0, len(model.spec.layers), 2)))


def _tell_passes(options: Distill, rows: Rows, context: Context) -> None:
    there = sum(map(len, rows.rows))
    passes = options.tokens / there
    context.progress(f"distill: {passes:.2g} passes over {there:,} tokens of text", 0.0)


def _entry(options: Distill, context: Context, done: Trained, teacher: Model | None) -> dict[str, Any]:
    """What the history keeps of it."""
    last = done.losses[-20:]
    return {
        "technique": "distill",
        "options": dataclasses.asdict(options),
        "seed": context.seed,
        "teacher": None if teacher is None else teacher.digest,
        "steps": done.steps,
        "tokens": done.tokens,
        "text_tokens": sum(map(len, context.windows)),
        "precision": done.precision,
        "loss": float(f"{sum(last) / len(last):.5g}"),
    }
