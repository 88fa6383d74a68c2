"""The same verdict on what was made elsewhere: an original, anybody's version of it, and a text that judges both.

    found = snello.check("Qwen/Qwen3-0.6B", "qwen3-q4.gguf", text="yours.txt", max_loss="1%")
    print(found.sentence, found.loss.high, found.exit_code)

Nothing is fitted and nothing made here, so the whole text judges: no cut is kept back for calibration. What the other
was calibrated on cannot be known, and a text of it would flatter it. Everything else is as in the gate: paired losses
with a one-sided 95% bound, the original against itself, a planted fault that must be caught, guards beside it, and no
verdict from a text that cannot give one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure import guards, quality
from snello.measure.documents import Document, order
from snello.measure.guards import Strictness
from snello.measure.interval import Interval
from snello.measure.judged import Judged
from snello.measure.judged.gguf import Gguf, is_gguf
from snello.measure.judged.native import NativeJudged, rule_between
from snello.measure.judged.server import Served, is_url
from snello.measure.limits import exact
from snello.measure.quality import Power
from snello.measure.rulers import Embeddings, Pairs, Reading, Ruler
from snello.measure.runner import Runner
from snello.measure.text import WINDOW, Block, Texts
from snello.optimize import sentence, texts
from snello.optimize.baseline import AGAIN_BLOCKS
from snello.optimize.examine import HABIT_PROMPTS, HABIT_TOKENS, model_prompts, sources_of
from snello.optimize.gate import judge_quality
from snello.optimize.passages import worst_passages
from snello.optimize.prepare import BLIND
from snello.optimize.publish import ANSWERS
from snello.optimize.receipts import Guards, Passage, SourceLoss
from snello.optimize.recipe import share
from snello.optimize.workbench import NativeWorkbench

if TYPE_CHECKING:
    from snello.models.model import Model

MAX_LOSS = 0.01
MOST_TOKENS = 131_072
IN_WINDOWS = ("causal-lm", "masked-lm")  # else by examples
UNSTEADY = "nothing can be told: the original gave other numbers when it was read again"

Report = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, kw_only=True)
class Check:
    """A verdict and what it stands on. Losses are shares (0.01 is 1%), divergences nats.

    Attributes:
        outcome: within the budget, over it, or the text cannot tell.
        exit_code: 0 within, 3 not shown to be within, 4 cannot tell.
        original, other: name, digest or address, bytes, and what runs it.
        loss: of the worst text, with one-sided 95% bounds; None where the other was not read.
        smallest_provable: the smallest loss that this text can prove.
        again: the original against itself; fault: a damaged original, whose loss is 1.1 times the budget.
    """

    outcome: Literal["within", "over", "cannot tell"]
    exit_code: int
    sentence: str
    reason: str
    original: dict[str, Any]
    other: dict[str, Any]
    measure: str
    max_loss: float
    smallest_provable: float
    again: Interval
    fault: Interval
    loss: Interval | None = None
    sources: tuple[SourceLoss, ...] = ()
    tokens: int = 0
    perplexity: tuple[float, float] | None = None  # original's, other's, on the worst text
    guards: Guards | None = None
    worst: tuple[Passage, ...] = ()
    text_sha256: str
    seed: int
    seconds: float = 0.0


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that says nothing."""


def check(
    original: str | Path,
    other: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    max_loss: float | str = MAX_LOSS,
    strict: bool = False,
    tokens: int = MOST_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    served_model: str | None = None,
    key: str | None = None,
    report: Report = silent,
) -> Check:
    """Judges `other` beside `original`.

    Args:
        original: a folder, a Hugging Face name, or demo.
        other: a folder or a name, a GGUF file (run by llama.cpp), or the address of a server of OpenAI's protocol.
        text: files or folders; the worst counts.
        max_loss: the budget, 0.01 or "1%".
        strict: the guards decide too.
        tokens: read of each text at most.
        served_model, key: of a server: which of its models, and what it lets in.

    Raises:
        SnelloError: one of them cannot be opened, or they are not versions of one model.
    """
    began, budget = time.perf_counter(), share(max_loss, "max_loss")
    paths = [Path(one).expanduser() for one in ([text] if isinstance(text, str | Path) else text)]
    bench = NativeWorkbench(threads)
    model = bench.load(original)
    documents = texts.read_documents(paths, model)
    judged = open_judged(bench, model, other, served_model=served_model, key=key)
    try:
        _check_cuts(documents, model, judged, seed=seed, most=tokens)
        longest = min(model.spec.max_positions, judged.longest or model.spec.max_positions - 1)
        if model.spec.task in IN_WINDOWS:
            longest = min(WINDOW, longest)
        runner = bench.open(model, context=max(WINDOW, longest))
        try:
            asked = _Asked(
                model=model,
                ruler=texts.ruler_of(model, documents),
                texts=texts.uncut(documents, model, longest=longest, seed=seed, most=tokens),
                longest=longest,
                max_loss=budget,
                strict=strict,
                seed=seed,
                report=report,
            )
            _check_dimensions(asked.ruler, model, judged)
            found = _judge(asked, runner, judged)
        finally:
            runner.close()
    finally:
        judged.close()
    return replace(found, seconds=time.perf_counter() - began)


# ---- what is judged ----


def open_judged(
    bench: NativeWorkbench, model: Model, other: str | Path, *, served_model: str | None, key: str | None
) -> Judged:
    """The artefact of this name, opened to be asked in the original's tokens."""
    served = is_url(str(other))
    if served_model is not None and not served:
        raise SnelloError("a served model needs a server", f"{other} is no address: http://...", exit_code=2)
    if served:
        _need_decoder(model, "a server")
        return Served(str(other), model, model=served_model, key=key)
    path = Path(other).expanduser()
    if is_gguf(path):
        from snello.engine.resources import physical_cores

        _need_decoder(model, "a GGUF file")
        positions = min(WINDOW, model.spec.max_positions)
        return Gguf(path, model, positions=positions, threads=bench.threads or physical_cores())
    loaded = bench.load(other)
    if loaded.spec.task != model.spec.task:
        message = f"{loaded.name} is made for {loaded.spec.task}, {model.name} for {model.spec.task}"
        raise Unsupported(message, "check compares a model with versions of itself")
    if loaded.spec.head.labels != model.spec.head.labels:
        message = f"{loaded.name} knows other labels than {model.name}"
        raise Unsupported(message, "check compares a model with versions of itself")
    rule = rule_between(model, loaded)  # strangers are refused before anything is opened
    return NativeJudged(loaded, bench.open(loaded, context=min(WINDOW, model.spec.max_positions)), rule)


def _need_decoder(model: Model, what: str) -> None:
    if not model.spec.causal:
        message = f"{what} is asked for next words, and {model.name} is made for {model.spec.task}"
        raise Unsupported(message, "an encoder is compared with a folder")


def _check_cuts(documents: Sequence[Sequence[Document]], model: Model, judged: Judged, *, seed: int, most: int) -> None:
    """The same words may be cut from a text by other rules: losses would be of tokens that the other never meets."""
    if not isinstance(judged, NativeJudged) or judged.rule is not None:
        return
    for source in documents:
        read = 0
        for document in order(source, seed):  # as they will be read
            if read >= most:
                break
            for words in filter(None, (document.text, document.other)):
                own, theirs = (one.tokenizer.encode(words) for one in (model, judged.model))
                if own != theirs:
                    message = f"{judged.model.name} cuts {document.name} into other tokens than {model.name}"
                    hint = "its losses would be of tokens that it never meets: give it the original's tokenizer"
                    raise Unsupported(message, hint)
                read += len(own)


def _check_dimensions(ruler: Ruler, model: Model, judged: Judged) -> None:
    if isinstance(ruler, Embeddings) and isinstance(judged, NativeJudged):
        sizes = [one.spec.hidden_size for one in (model, judged.model)]
        if sizes[0] != sizes[1]:
            message = f"vectors of {sizes[1]} numbers have no angle to vectors of {sizes[0]}"
            raise Unsupported(message, "give labelled pairs instead: a .tsv of text, text and label")


# ---- the verdict ----


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What judging needs to know."""

    model: Model
    ruler: Ruler
    texts: Texts
    longest: int  # tokens that both read at once
    max_loss: float
    strict: bool
    seed: int
    report: Report

    @property
    def blocks(self) -> list[Block]:
        return self.texts.blocks("proof")

    def step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(what, done, total)


def _judge(asked: _Asked, runner: Runner, judged: Judged) -> Check:
    blocks, ruler, seed = asked.blocks, asked.ruler, asked.seed
    original = ruler.read(runner, blocks, asked.step("read the original"))
    again = ruler.read(runner, blocks[:AGAIN_BLOCKS], asked.step("read it again"))
    fault = quality.plant(ruler, original, blocks, max_loss=asked.max_loss, seed=seed)
    planted = quality.compare(ruler, original, fault, blocks, seed=seed)
    power = _power(asked, original, fault)
    first = Reading(original.values[:AGAIN_BLOCKS], original.choices[:AGAIN_BLOCKS])
    known: dict[str, Any] = {
        "original": {"name": str(asked.model.name), "digest": str(asked.model.digest)},
        "other": judged.facts(),
        "measure": ruler.name,
        "max_loss": asked.max_loss,
        "smallest_provable": power.worst,
        "again": quality.compare(ruler, first, again, blocks[:AGAIN_BLOCKS], seed=seed, same_model=True).loss,
        "fault": planted.loss,
        "text_sha256": asked.texts.sha256,
        "seed": seed,
    }
    caught = all(judge_quality(one.loss, asked.max_loss) is not None for one in planted.sources)
    steady = known["again"] == Interval.exact(0.0)
    if not (steady and power.enough and caught):
        told = UNSTEADY if not steady else BLIND if power.enough else power.sentence
        return Check(outcome="cannot tell", exit_code=4, sentence=told, reason=told, **known)
    other = judged.read(ruler, blocks, asked.step(f"read {judged.facts()['name']}"))
    same = judged.facts().get("digest") == str(asked.model.digest)
    found = quality.compare(ruler, original, other, blocks, seed=seed, same_model=same)
    watched = _guards(asked, runner, judged, original, other)
    refused = judge_quality(found.loss, asked.max_loss, strict_failures=watched.failed if asked.strict else ())
    outcome: Literal["within", "over", "cannot tell"] = "within"
    if refused is not None:
        outcome = "over" if refused.verdict == "dropped" else "cannot tell"
    reason = "" if refused is None else refused.reason
    told = _sentence(asked, outcome, reason, found.loss, watched, found.tokens)
    return Check(
        outcome=outcome,
        exit_code={"within": 0, "over": 3, "cannot tell": 4}[outcome],
        sentence=told,
        reason=reason,
        loss=found.loss,
        sources=sources_of(found),
        tokens=found.tokens,
        perplexity=_perplexity(asked, found.worst.source, original, other),
        guards=watched,
        worst=worst_passages(ruler, asked.model, original, other, blocks),
        **known,
    )


def _power(asked: _Asked, original: Reading, fault: Reading) -> Power:
    """What this text can prove; where the limit and not the text ended it, the limit is what to change."""
    read = sum(source.num_tokens for source in asked.texts.sources)
    found = quality.power(
        asked.ruler, original, fault, asked.blocks, max_loss=asked.max_loss, total_tokens=read, seed=asked.seed
    )
    worst = max(asked.texts.sources, key=lambda source: found.smallest[source.name])
    if not worst.cut_short:
        return found
    needed = quality.round_up(found.tokens_needed)
    return replace(found, reading=f"--tokens {needed}" if needed else "more --tokens")


def _guards(asked: _Asked, runner: Runner, judged: Judged, original: Reading, other: Reading) -> Guards:
    """What the mean can hide, as far as this artefact tells it."""
    if isinstance(asked.ruler, Embeddings):
        cosine = 1 - float(np.concatenate(asked.ruler.differences(original, other, asked.blocks)).mean())
        return Guards(mean_cosine=cosine, neighbours_kept=guards.neighbours_kept(original, other))
    agreed = guards.agreement(original, other) if other.choices else None
    if not asked.model.spec.causal:
        return Guards(top1_agreement=None if isinstance(asked.ruler, Pairs) else agreed)
    prompts = [prompt[: asked.longest // 2] for prompt in model_prompts(asked.model)[:HABIT_PROMPTS]]
    most = min(HABIT_TOKENS, asked.longest // 2)
    diverged = judged.divergence(runner, asked.blocks, seed=asked.seed, step=asked.step("divergence"))
    theirs = guards.habits(runner, prompts, max_tokens=most, step=asked.step("the original answers"))
    own = judged.habits(prompts, most=most, step=asked.step("the other answers"))
    return Guards(
        mean_divergence=None if diverged is None else diverged.mean,
        divergence_p99=None if diverged is None else diverged.p99,
        divergence_quantiles=() if diverged is None else diverged.quantiles,
        top1_agreement=agreed,
        looping=(theirs.looping, own.looping),
        ending=(theirs.ending, own.ending),
        prompts=len(prompts),
        failed=Strictness().failures(asked.max_loss, diverged, agreed, theirs, own),
    )


def _perplexity(asked: _Asked, source: str, original: Reading, other: Reading) -> tuple[float, float] | None:
    if not asked.model.spec.causal:
        return None
    chosen = [number for number, block in enumerate(asked.blocks) if block.source == source]
    means = [np.concatenate([r.values[i] for i in chosen]).mean(dtype=np.float64) for r in (original, other)]
    return float(np.exp(means[0])), float(np.exp(means[1]))


def _sentence(asked: _Asked, outcome: str, reason: str, loss: Interval, watched: Guards, tokens: int) -> str:
    budget = exact(asked.max_loss)
    if outcome == "cannot tell":
        return f"this text cannot tell: {reason}"
    unit = "tokens" if asked.model.spec.task in IN_WINDOWS else "examples"
    head = f"within {budget}" if outcome == "within" else f"not within {budget}: {reason}"
    return sentence.checked(
        head,
        loss=loss,
        measure=asked.ruler.name,
        agreement=watched.top1_agreement,
        answers=ANSWERS.get(asked.model.spec.task, "answers"),
        neighbours=watched.neighbours_kept,
        read=f"{tokens:,} {unit}",
    )
