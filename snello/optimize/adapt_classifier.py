"""An encoder that learns labels, from data to a folder: held out first, then trained, then judged.

Better means: the lower 95% bound of its accuracy on held-out texts, paired with always saying the commonest label (or
with the base, where that tells these labels apart already and is right more often), is above zero. With corrections the
result is an adapter in PEFT's format or the model with it in; where the head or all weights learned, it is a model in
the form of Transformers' `...ForSequenceClassification`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models import adapter as files
from snello.models.classifier import Classifier, as_classifier, check_encoder
from snello.models.plain_folder import check_free, shaped_config, write_plain_folder
from snello.optimize.adapt import REFUSED, Adapted, asked
from snello.optimize.adapt_data import Example, Split, read_examples, split
from snello.optimize.adapt_judge import MOST_TOKENS, accuracy_verdict

if TYPE_CHECKING:
    from snello.models.model import Floats, Model
    from snello.techniques.adapt import Adapt
    from snello.techniques.adapt.classify import Labelled

LABELS_HINT = 'JSONL with {"text", "label"}, or a TSV of text and label'


def classify(
    model: Model,
    data: Path,
    options: Adapt,
    output: Path,
    *,
    merged: bool,
    seed: int,
    threads: int | None,
    progress: Callable[[str, float], None],
) -> Adapted:
    """Teaches `model` the labels of `data`, and writes an adapter, or the classifier where `merged` or without one.

    Raises:
        SnelloError: the model or the data cannot be used; or, with exit code 3, it does not beat its base.
    """
    check_encoder(model)
    whole = merged or options.method != "lora"
    (check_free if whole else files.check_adapter_place)(output)
    examples = read_examples(data)
    labels = _labels(model, examples, data)
    parts = split(examples, seed)
    _check_taught(labels, parts)
    from snello.techniques.adapt import classify as training

    classifier = as_classifier(model, labels)
    own = classifier.model
    shaped_config(own, dataclasses.replace(own.spec, formats=()), classifier.edits)
    if options.method == "lora":
        files.module_names(own.spec, options.linears(own.spec))  # what no file can say fails before time is spent
    known = own.spec.head.labels
    texts, held = (encoded(own, part, known) for part in (parts.train, parts.held_out))
    module = training.learner(classifier, options, seed)
    true = np.array([text.label for text in held])
    base = _base(classifier, parts, true, known, lambda: training.score(module, held))
    work = output.with_name(f".{output.name}.training")
    where: dict[str, Any] = {"seed": seed, "threads": threads, "progress": progress, "work_dir": work}
    done = training.teach(module, texts, options, base=own.digest, **where)
    verdict = accuracy_verdict(training.score(module, held).argmax(1) == true, base, parts.families, seed)
    shutil.rmtree(work, ignore_errors=True)
    if verdict.gain.low <= 0:
        message = f"what was learned does not beat {model.name}: {verdict.sentence()}"
        raise SnelloError(message, "nothing was written; give more examples, or other options", exit_code=REFUSED)
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    facts = {**asked(options, examples, seed), "examples": len(parts.train), "dropped": parts.dropped}
    facts |= {"trained": done.digest, "verdict": dataclasses.asdict(verdict), "parameters": parameters}
    _write(output, model, classifier, options, module, facts, merged=merged)
    return Adapted.of(output, verdict, parts, parameters, done)


def encoded(model: Model, examples: Sequence[Example], labels: Sequence[str]) -> list[Labelled]:
    """Texts as tokens and the numbers of their labels; a long text loses its end, but for the last special token."""
    from snello.techniques.adapt.classify import Labelled

    limit, numbers = min(MOST_TOKENS, model.spec.max_positions), {label: n for n, label in enumerate(labels)}
    found = []
    for example in examples:
        tokens = np.array(model.tokenizer.encode(example.text), np.int32)
        if len(tokens) > limit:
            tokens = np.append(tokens[: limit - 1], tokens[-1:])
        if not len(tokens):
            raise SnelloError("a text has no tokens", "leave empty texts out")
        found.append(Labelled(tokens, numbers[str(example.label)]))
    return found


def _labels(model: Model, examples: Sequence[Example], data: Path) -> list[str]:
    if any(example.label is None for example in examples):
        raise Unsupported(f"{model.name} is an encoder, and {data} has no labels", LABELS_HINT)
    found = sorted({str(example.label) for example in examples})
    if len(found) < 2:
        raise SnelloError(
            f"all examples of {data} have the label {found[0]!r}", "two labels at least can be told apart"
        )
    return found


def _check_taught(labels: Sequence[str], parts: Split) -> None:
    taught = {str(example.label) for example in parts.train}
    for label in labels:
        if label not in taught:
            message = f"no example of the label {label!r} is left to train on"
            raise SnelloError(message, "give more examples of it; a fifth is held out")


def _base(
    classifier: Classifier, parts: Split, true: np.ndarray, labels: Sequence[str], score: Callable[[], Floats]
) -> np.ndarray:
    """Where what is compared with is right (N,): the commonest label, or a head that knows these labels already."""
    counts = Counter(str(example.label) for example in parts.train)
    common = max(labels, key=lambda label: (counts[label], label))
    rights = [true == list(labels).index(common)]
    if "head.weight" not in classifier.fresh:
        rights.append(score().argmax(1) == true)
    return max(rights, key=lambda right: float(right.mean()))


def _write(
    output: Path,
    model: Model,
    classifier: Classifier,
    options: Adapt,
    module: Any,
    facts: dict[str, Any],
    *,
    merged: bool,
) -> None:
    from snello.techniques.adapt import classify as training
    from snello.techniques.adapt import lora
    from snello.techniques.adapt.merge import merge

    own, saved = classifier.model, training.learned(module)
    if options.method == "lora":
        adapter = files.Adapter(
            factors=lora.factors(module),
            magnitudes=lora.magnitudes(module),
            rank=options.rank,
            alpha=options.alpha,
            scale=options.scale,
            dropout=options.dropout,
            base=model.digest,
            facts=facts,
            labels=own.spec.head.labels,
            saved=saved,
        )
        if merged:
            merge(model, adapter, output)
        else:
            files.write_adapter(output, adapter, own)
        return

    def values(name: str) -> Floats:
        return saved[name] if name in saved else own.weights.values(name)

    entry = {"technique": "adapt", "merged": True, "base": model.digest, **facts}
    spec = dataclasses.replace(own.spec, formats=())
    write_plain_folder(output, spec, own, (*model.history, entry), values, edits=classifier.edits)
