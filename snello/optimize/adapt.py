"""An adapter from data to a folder: held out first, then trained, then judged, and written only if it is better.

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

from snello.errors import SnelloError
from snello.optimize.adapt_data import Example, Split, read_examples, split
from snello.optimize.adapt_judge import Verdict, encode, judge_of

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.adapt import Adapt
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
    if not model.spec.causal:
        from snello.optimize.adapt_classifier import classify

        how: dict[str, Any] = {"seed": seed, "threads": threads, "progress": progress}
        return classify(model, data, options, output, merged=merged, **how)
    from snello.models import adapter as files
    from snello.models.plain_folder import check_free
    from snello.techniques.adapt import lora, train
    from snello.techniques.adapt.merge import merge

    linears = options.linears(model.spec)
    files.module_names(model.spec, linears)  # what no file can say fails before time is spent
    (check_free if merged else files.check_adapter_place)(output)
    examples = read_examples(data)
    parts = split(examples, seed)
    answers = [answer for example in parts.train for answer in encode(model, example)]
    judge = judge_of(model, parts, seed)
    module = lora.with_corrections(model, options, seed)
    work = output.with_name(f".{output.name}.training")
    score = functools.partial(train.score, module)
    judge.before(score)
    done = train.teach(
        module, answers, options, base=model.digest, seed=seed, threads=threads, progress=progress, work_dir=work
    )
    verdict = judge.after(score)
    shutil.rmtree(work, ignore_errors=True)
    if verdict.gain.low <= 0:
        message = f"the adapter does not beat {model.name}: {verdict.sentence()}"
        raise SnelloError(message, "nothing was written; give more examples, or other options", exit_code=REFUSED)
    factors, magnitudes = lora.factors(module), lora.magnitudes(module)
    parameters = sum(a.size + b.size for a, b in factors.values()) + sum(m.size for m in magnitudes.values())
    adapter = files.Adapter(
        factors=factors,
        magnitudes=magnitudes,
        rank=options.rank,
        alpha=options.alpha,
        scale=options.scale,
        dropout=options.dropout,
        base=model.digest,
        facts={**asked(options, examples, seed), **_facts(verdict, parts, done.digest), "parameters": parameters},
    )
    if merged:
        merge(model, adapter, output)
    else:
        files.write_adapter(output, adapter, model)
    return Adapted.of(output, verdict, parts, parameters, done)


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
