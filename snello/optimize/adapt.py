"""An adapter from data to a folder: held out first, then trained, then judged, and written only if it is better.

Better means: the lower 95% bound of what it gains on held-out examples, paired with its base, is above zero. Texts
are judged by their loss per token, labels by accuracy against the base or the commonest label, whichever is right more
often. torch is imported in the functions that need it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snello.errors import SnelloError
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.interval import Interval
from snello.optimize.adapt_data import Example, Split, read_examples, split

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.models.reference import Reference
    from snello.techniques.adapt import Adapt
    from snello.techniques.adapt.train import Answer

MOST_TOKENS = 512  # of one example
MOST_LABELS = 20
REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`before` and `after`: loss per token in nats, or accuracy; `gain` is above zero where the adapter is better."""

    measure: str  # "loss" or "accuracy"
    before: float
    after: float
    gain: Interval
    held_out: int

    def sentence(self) -> str:
        scale, unit = (100, " points") if self.measure == "accuracy" else (1, " nats a token")
        numbers = f"{self.measure} {self.before:.3f} -> {self.after:.3f}"
        bounds = f"{scale * self.gain.low:+.3g} to {scale * self.gain.high:+.3g}{unit}, 95%"
        return f"{numbers} on {self.held_out} held-out examples ({bounds})"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    path: Path
    verdict: Verdict
    examples: int
    dropped: int
    parameters: int
    seconds: float
    digest: str


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
    """Trains an adapter on `data` and writes it, or the model with it in, at `output`.

    Raises:
        SnelloError: the data cannot be used; or, with exit code 3, the adapter does not beat its base.
    """
    from snello.models import adapter as files
    from snello.models.plain_folder import check_free
    from snello.techniques.adapt import lora, train
    from snello.techniques.adapt.merge import merge

    linears = options.linears(model.spec)
    files.module_names(model.spec, linears)  # what no file can say fails before time is spent
    (check_free if merged else files.check_adapter_place)(output)
    parts = split(read_examples(data), seed)
    answers = [answer for example in parts.train for answer in encode(model, example)]
    judge = _judge(model, parts, seed)
    module = lora.with_corrections(model, options, seed)
    work = output.with_name(f".{output.name}.training")
    judge.before(module)
    done = train.teach(
        module, answers, options, base=model.digest, seed=seed, threads=threads, progress=progress, work_dir=work
    )
    verdict = judge.after(module)
    shutil.rmtree(work, ignore_errors=True)
    if verdict.gain.low <= 0:
        message = f"the adapter does not beat {model.name}: {verdict.sentence()}"
        raise SnelloError(message, "nothing was written; give more examples, or other options", exit_code=REFUSED)
    adapter = files.Adapter(
        factors=lora.factors(module),
        rank=options.rank,
        alpha=options.alpha,
        scale=options.scale,
        dropout=options.dropout,
        base=model.digest,
        facts=_facts(options, verdict, parts, seed, done.digest),
    )
    if merged:
        merge(model, adapter, output)
    else:
        files.write_adapter(output, adapter, model)
    return Adapted(
        path=output,
        verdict=verdict,
        examples=len(parts.train),
        dropped=parts.dropped,
        parameters=sum(a.size + b.size for a, b in adapter.factors.values()),
        seconds=done.seconds,
        digest=done.digest,
    )


def _facts(options: Adapt, verdict: Verdict, parts: Split, seed: int, digest: str) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(options),
        "seed": seed,
        "examples": len(parts.train),
        "trained": digest,
        "verdict": dataclasses.asdict(verdict),
    }


def encode(model: Model, example: Example) -> list[Answer]:
    """An example as tokens: a long prompt loses its beginning, plain text becomes several windows.

    Raises:
        SnelloError: an answer is longer than the model can see.
    """
    from snello.techniques.adapt.train import Answer

    limit, spec = min(MOST_TOKENS, model.spec.max_positions), model.spec
    before = model.tokenizer.encode(example.prompt)
    if not before:
        first = spec.bos_token if spec.bos_token is not None else next(iter(spec.eos_tokens), None)
        if first is None:
            raise SnelloError(f"{model.name} has no token to begin with", "give examples with a prompt")
        before = [first]
    answer = [*model.tokenizer.encode(example.completion, add_special=False), *spec.eos_tokens[:1]]
    if example.family is not None:
        whole, windows = [*before, *answer], range(0, len(before) + len(answer), limit)
        pieces = [np.array(whole[start : start + limit], np.int32) for start in windows]
        return [Answer(piece, 1) for piece in pieces if len(piece) > 1]
    if len(answer) >= limit:
        message = f"the completion of {example.prompt[:40]!r} has {len(answer)} tokens, {limit - 1} fit"
        raise SnelloError(message, "give shorter completions")
    before = before[-(limit - len(answer)) :]
    return [Answer(np.array([*before, *answer], np.int32), len(before))]


# ---- judging --------------------------------------------------------------------------------------------------------


def _judge(model: Model, parts: Split, seed: int) -> _ByLoss | _ByLabel:
    return (_ByLoss if parts.held_out[0].label is None else _ByLabel)(model, parts, seed)


class _ByLoss:
    """Loss per token of held-out completions; all of an example is one block."""

    def __init__(self, model: Model, parts: Split, seed: int) -> None:
        self.seed, self.count = seed, len(parts.held_out)
        each = [encode(model, example) for example in parts.held_out]
        self.answers = [answer for answers in each for answer in answers]
        pairs = zip(parts.families, each, strict=True)
        self.families = [family for family, answers in pairs for _ in answers]

    def before(self, module: Reference) -> None:
        from snello.techniques.adapt.train import score

        self.base = score(module, self.answers)

    def after(self, module: Reference) -> Verdict:
        from snello.techniques.adapt.train import score

        found = score(module, self.answers)
        differences = [base - own for base, own in zip(self.base, found, strict=True)]
        return Verdict(
            measure="loss",
            before=float(np.concatenate(self.base).mean()),
            after=float(np.concatenate(found).mean()),
            gain=mean_interval(Clusters.of(differences, self.families), seed=self.seed),
            held_out=self.count,
        )


class _ByLabel:
    """Accuracy of the likeliest label, against the better of the base and of always saying the commonest one."""

    def __init__(self, model: Model, parts: Split, seed: int) -> None:
        self.seed, self.families = seed, parts.families
        counts = Counter(str(example.label) for example in parts.train)
        self.labels = sorted(counts)
        if not 2 <= len(self.labels) <= MOST_LABELS:
            message = f"the examples have {len(self.labels)} different labels"
            raise SnelloError(message, f"2 to {MOST_LABELS} are supported; else write them as prompt and completion")
        self.true = np.array([str(example.label) for example in parts.held_out])
        self.answers = [
            encode(model, dataclasses.replace(example, completion=f" {label}"))[0]
            for example in parts.held_out
            for label in self.labels
        ]
        self.common = max(self.labels, key=lambda label: (counts[label], label))

    def before(self, module: Reference) -> None:
        rights: Sequence[np.ndarray] = (self._right(module), self.true == self.common)
        self.base = max(rights, key=lambda right: float(right.mean()))

    def _right(self, module: Reference) -> np.ndarray:
        from snello.techniques.adapt.train import score

        losses = np.array([float(each.sum()) for each in score(module, self.answers)]).reshape(len(self.true), -1)
        right: np.ndarray = np.array(self.labels)[losses.argmin(1)] == self.true
        return right

    def after(self, module: Reference) -> Verdict:
        right = self._right(module)
        differences = [np.array([float(a) - float(b)]) for a, b in zip(right, self.base, strict=True)]
        return Verdict(
            measure="accuracy",
            before=float(self.base.mean()),
            after=float(right.mean()),
            gain=mean_interval(Clusters.of(differences, self.families), seed=self.seed),
            held_out=len(self.true),
        )
