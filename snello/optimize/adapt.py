"""An adapter from data to a folder: held out first, then trained, then judged, and written only if it is better.
Corrections of low rank and learned prompts alike.

Better means: the lower 95% bound of what it gains on held-out examples, paired with its base, is above zero. Texts
are judged by their loss per token, labels by accuracy against the base or the commonest label, whichever is right more
often. torch is imported in the functions that need it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.errors import SnelloError, Unsupported
from snello.optimize.adapt_data import Example, Split, read_examples, split
from snello.optimize.adapt_judge import Verdict, encode, judge_of

if TYPE_CHECKING:
    from snello.models.adapter import Adapter
    from snello.models.model import Model
    from snello.models.reference import Reference
    from snello.techniques.adapt import Adapt
    from snello.techniques.adapt.train import Answer
    from snello.training.loop import Trained

REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Adapted:
    path: Path
    verdict: Verdict
    examples: int
    dropped: int
    parameters: int
    seconds: float
    digest: str

    @classmethod
    def of(cls, path: Path, verdict: Verdict, parts: Split, parameters: int, done: Trained) -> Adapted:
        return cls(
            path=path,
            verdict=verdict,
            examples=len(parts.train),
            dropped=parts.dropped,
            parameters=parameters,
            seconds=done.seconds,
            digest=done.digest,
        )


def adapt(
    model: Model,
    data: Path,
    options: Adapt,
    output: Path,
    *,
    merged: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, float], None] = lambda message, fraction: None,
) -> Adapted:
    """Trains an adapter on `data` and writes it, or the model with it in, at `output`; of an encoder, a classifier.

    Raises:
        SnelloError: the data cannot be used; or, with exit code 3, the adapter does not beat its base.
    """
    how: dict[str, Any] = {"seed": seed, "threads": threads, "progress": progress}
    if not model.spec.causal:
        from snello.optimize.adapt_classifier import classify

        return classify(model, data, options, output, merged=merged, **how)
    from snello.models import adapter as files
    from snello.models.plain_folder import check_free
    from snello.techniques.adapt import train
    from snello.techniques.adapt.merge import merge

    linears = options.linears(model.spec)
    files.module_names(model.spec, linears)  # what no file can say fails before time is spent
    _check_prompt(model, options, merged)
    (check_free if merged else files.check_adapter_place)(output)
    examples = read_examples(data)
    parts = split(examples, seed)
    taken = options.virtual_tokens if options.method == "prompt" else 0
    answers = [answer for example in parts.train for answer in encode(model, example, taken)]
    judge = judge_of(model, parts, seed, taken)
    module, with_it = _learner(model, options, answers, seed)
    work = output.with_name(f".{output.name}.training")
    judge.before(functools.partial(train.score, module))
    done = train.teach(module, with_it(answers), options, base=model.digest, work_dir=work, **how)
    verdict = judge.after(lambda held_out: train.score(module, with_it(held_out)))
    shutil.rmtree(work, ignore_errors=True)
    if verdict.gain.low <= 0:
        message = f"the adapter does not beat {model.name}: {verdict.sentence()}"
        raise SnelloError(message, "nothing was written; give more examples, or other options", exit_code=REFUSED)
    found = _learned(module, options)
    values = [*found.magnitudes.values(), *(half for pair in found.factors.values() for half in pair)]
    values += [] if found.prompt is None else [found.prompt]
    parameters = sum(array.size for array in values)
    facts = {**asked(options, examples, seed), **_facts(verdict, parts, done.digest), "parameters": parameters}
    adapter = dataclasses.replace(found, base=model.digest, facts=facts)
    if merged:
        merge(model, adapter, output)
    else:
        files.write_adapter(output, adapter, model)
    return Adapted.of(output, verdict, parts, parameters, done)


def _check_prompt(model: Model, options: Adapt, merged: bool) -> None:
    if options.method != "prompt":
        return
    if merged:
        raise Unsupported("a prompt changes no weight: it cannot be merged", "leave out --merge, or method=lora")
    if 2 * options.virtual_tokens > model.spec.max_positions:
        positions = f"{model.name} has {model.spec.max_positions:,} positions"
        raise SnelloError(f"virtual_tokens={options.virtual_tokens}, and {positions}", "at most half of them")


def _learner(
    model: Model, options: Adapt, answers: Sequence[Answer], seed: int
) -> tuple[Reference, Callable[[Sequence[Answer]], Sequence[Answer]]]:
    """The base with what is to learn, and texts as it reads them with that: corrections are always there, a prompt
    stands before a text.
    """
    from snello.techniques.adapt import lora, prompt

    if options.method != "prompt":
        return lora.with_corrections(model, options, seed), lambda answers: answers
    ids = prompt.ids_of(model.spec, options.virtual_tokens)
    return prompt.with_prompt(model, options, answers, seed), functools.partial(prompt.behind, ids)


def _learned(module: Reference, options: Adapt) -> Adapter:
    from snello.models.adapter import Adapter
    from snello.techniques.adapt import lora, prompt

    if options.method == "prompt":
        return Adapter(prompt=prompt.rows_of(module))
    how: dict[str, Any] = {"rank": options.rank, "alpha": options.alpha, "scale": options.scale}
    return Adapter(factors=lora.factors(module), magnitudes=lora.magnitudes(module), dropout=options.dropout, **how)


def asked(options: Adapt, examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """What decides an adapter, beside its base."""
    rows = json.dumps([dataclasses.astuple(example) for example in examples], ensure_ascii=False)
    digest = hashlib.sha256(rows.encode()).hexdigest()
    return {"options": dataclasses.asdict(options), "seed": seed, "data": digest}


def _facts(verdict: Verdict, parts: Split, digest: str) -> dict[str, Any]:
    return {
        "examples": len(parts.train),
        "dropped": parts.dropped,
        "trained": digest,
        "verdict": dataclasses.asdict(verdict),
    }
