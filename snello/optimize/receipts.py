"""What a run leaves behind so that anybody can check it: one JSON file per step, nothing left to compute.

`00-run.json` says what was asked, of which model and text, on which machine. Then one receipt per step in the
order in which the steps were judged ("01-original.json", "02-original-again.json", "03-planted-fault.json",
"04-quantize-int8.json", ...). The last is the proof. A receipt is a frozen dataclass of plain values; `read`
refuses what it does not know.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.optimize.events import LadderRow, PlannedStage, TextSource, plain
from snello.optimize.files import write_atomically
from snello.optimize.plain import revive

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    name: str
    digest: str  # sha256 over spec and weights
    spec_digest: str
    num_parameters: int
    weights: str  # number type of the body, "bf16"
    weights_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What `snello bench` prints, measured on this machine beside its ceiling.

    The three costs are what the goals judge; None: not measured. `latency_seconds`: time to first token of a
    prompt of 512 tokens plus 127 times the time between tokens.
    """

    prefill_tokens_per_second: Interval  # least, median, most
    decode_tokens_per_second: Interval
    ceiling_prefill_tokens_per_second: float
    ceiling_decode_tokens_per_second: float
    bytes_per_token: int
    first_token_seconds: float
    latency_seconds: float
    throughput_tokens_per_second: float | None = None
    peak_resident_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceSpeed:
    """An encoder's sequences a second at one length, beside the most that this machine allows."""

    tokens: int
    sequences_per_second: Interval  # least, median, most
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class CostRatio:
    """Cost of the step over cost of what it is compared with, by one goal. `pairs`: in order of
    measurement.
    """

    goal: str
    against: str
    ratio: Interval  # two-sided 95%
    steady: bool  # half-width at most 1.5%
    pairs: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Always reported; they decide only with `--strict`. Rates are of fixed prompts, paired with the
    original's.
    """

    mean_divergence: float | None = None  # KL(original || this), nats
    divergence_p99: float | None = None
    divergence_quantiles: tuple[tuple[float, float], ...] = ()  # (share, nats), for the cumulative curve
    top1_agreement: float | None = None
    looping: tuple[float, float] | None = None  # original's rate, this one's
    ending: tuple[float, float] | None = None
    prompts: int = 0
    mean_cosine: float | None = None  # embeddings
    neighbours_kept: float | None = None
    failed: tuple[str, ...] = ()  # guards that --strict would not pass, in words


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """The loss on one `--text`; the worst decides."""

    source: str
    tokens: int  # scored (examples for encoders)
    blocks: int
    loss: Interval  # L with its one-sided 95% bounds


@dataclass(frozen=True, kw_only=True)
class ControlFacts:
    """The original after the same training as the candidate's: `loss` is against the original, below zero a gain."""

    name: str
    digest: str
    loss: Interval


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was measured about the quality of one candidate on one cut of the text."""

    cut: Literal["select", "proof"]
    measure: str
    loss: Interval  # the worst source's
    sources: tuple[SourceLoss, ...]
    guards: Guards
    increment: Interval | None = None  # against the best until then
    weights_only: Interval | None = None  # dequantized weights in the reference, on a part of the cut
    weights_only_note: str = ""  # why it is absent, or on how many tokens
    executor_on_same_part: Interval | None = None  # the executor on that same part
    metric: Interval | None = None  # the user's own score: how much worse
    against: str = "original"  # whom `loss` and `sources` compare with: of steps that train, the better one
    over_original: Interval | None = None  # the loss against the original, where `against` may be another
    controls: tuple[ControlFacts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunReceipt:
    kind: Literal["run"] = "run"
    schema: int = SCHEMA
    model: ModelFacts
    machine: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...]
    replay: str  # the command that gives the same artefact
    seed: int
    created: str  # ISO 8601, UTC
    text: tuple[TextSource, ...]
    text_sha256: str
    self_written: bool
    measure: str
    max_loss: float
    goal: str
    strict: bool
    metric: str | None
    target: float | None  # times
    target_bytes: int | None = None
    time_budget_seconds: float
    smallest_provable: float
    power_rule: str
    workload: str
    plan: tuple[PlannedStage, ...]


@dataclass(frozen=True, kw_only=True)
class StepReceipt:
    """One step, and the verdict on the stage it stands or falls with. Also the original, A/A and the planted
    fault.
    """

    kind: Literal["step"] = "step"
    schema: int = SCHEMA
    index: int
    step: str
    stage: str
    row: LadderRow
    technique: str | None
    options: dict[str, Any]
    applied_to: str | None  # the stage whose model it was applied to
    chain: tuple[dict[str, Any], ...] = ()  # all steps from the original on, every option spelt out
    spec_before: str | None  # digests
    spec_after: str | None
    model: ModelFacts | None
    artifact_sha256: str | None = None
    seconds: float
    evidence: Evidence | None = None
    speed: Speed | None = None
    sequences: tuple[SequenceSpeed, ...] = ()  # encoders
    costs: tuple[CostRatio, ...] = ()
    margin: str = ""  # how near the decision was, in words
    machine: str
    versions: dict[str, str]
    seed: int
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One window where the lean model lost most: tokens with their losses, so that the page can underline
    them.
    """

    source: str
    document: str
    start: int  # first token of the passage within its document
    tokens: tuple[str, ...]
    original: tuple[float, ...]  # nats per token
    lean: tuple[float, ...]
    difference: float  # sum of lean - original


@dataclass(frozen=True, kw_only=True)
class DocumentLoss:
    source: str
    document: str
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """`tied_with`: stages from which its paired difference is not told apart."""

    name: str
    speedup: Interval
    loss: Interval
    weights_bytes: int
    verdict: str
    on_front: bool
    tied_with: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The final chain without one of its parts: its own speed-up and loss over the original, and what the part brings.

    Shares are of the chain's speed-up (by logarithm) and loss. Parts interact, so they need not add up to one.
    """

    without: str
    speedup: Interval
    loss: Interval
    note: str = ""
    gain: Interval | None = None  # the chain over the chain without it, in turn
    added: Interval | None = None  # the chain's loss over that of the chain without it, paired
    speed_share: float | None = None
    loss_share: float | None = None  # None: the chain loses nothing that this text could show


@dataclass(frozen=True, kw_only=True)
class Duel:
    """The final chain over a single step that came near it, timed in turn."""

    single: str
    gain: Interval
    steady: bool  # known to 1.5%


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Both perplexities on the text that decided, for who recomputes them (`proof.json` holds the windows)."""

    source: str
    original: float
    lean: float


@dataclass(frozen=True, kw_only=True)
class ProofReceipt:
    kind: Literal["proof"] = "proof"
    schema: int = SCHEMA
    index: int
    exit_code: int
    sentence: str
    reason: str
    proved: bool
    tokens: int
    evidence: Evidence | None
    again: Interval | None  # the original against itself
    fault: Interval | None  # the planted fault
    fault_caught: bool | None
    perplexity: Perplexity | None = None  # decoders only
    sharper: float | None  # how many times narrower than the unpaired interval the paired one is
    speedup: Interval | None
    engine_speedup: Interval | None
    engine_note: str
    size_ratio: float | None
    speed_original: Speed | None
    speed_lean: Speed | None
    sequences_original: tuple[SequenceSpeed, ...] = ()  # encoders
    sequences_lean: tuple[SequenceSpeed, ...] = ()
    costs: tuple[CostRatio, ...]
    ladder: tuple[LadderRow, ...]
    pareto: tuple[ParetoPoint, ...]
    ablation: tuple[Ablation, ...]
    duels: tuple[Duel, ...] = ()
    worst: tuple[Passage, ...]
    documents: tuple[DocumentLoss, ...]
    not_measured: tuple[str, ...]  # what the report should hold and this run could not give, with the reason
    artifact_sha256: str | None
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    seconds: float
    replay: str


@dataclass(frozen=True, kw_only=True)
class TaskGain:
    """On a task's held-out examples: loss per token in nats, or accuracy; `gain` is paired, above zero is better."""

    before: float
    after: float
    gain: Interval


@dataclass(frozen=True, kw_only=True)
class TaskReceipt:
    """What an adapted model knows of its task, before it was made lean and after."""

    kind: Literal["task"] = "task"
    schema: int = SCHEMA
    index: int
    measure: str  # "loss" or "accuracy"
    held_out: int  # examples
    families: int
    full: TaskGain  # adapted over base, both in full precision, in the reference
    lean: TaskGain  # lean adapted over the base made lean by the same steps, in the executor that serves
    base: str  # digests
    lean_base: str


Receipt = RunReceipt | StepReceipt | ProofReceipt | TaskReceipt
_KINDS: dict[str, type[Any]] = {"run": RunReceipt, "step": StepReceipt, "proof": ProofReceipt, "task": TaskReceipt}


@dataclass(frozen=True, kw_only=True)
class Receipts:
    """All receipts of one folder, in order."""

    run: RunReceipt
    steps: tuple[StepReceipt, ...]
    proof: ProofReceipt | None
    task: TaskReceipt | None = None  # of a model that was adapted first


def write(folder: Path, index: int, name: str, receipt: Receipt) -> Path:
    """`folder/NN-name.json`, written beside and renamed."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = folder / f"{index:02d}-{slug}.json"
    write_atomically(path, json.dumps(plain(receipt), indent=1, ensure_ascii=False) + "\n")
    return path


def read(folder: Path) -> Receipts:
    """The receipts of a run; `folder` is `<output>/receipts` or `<output>`."""
    folder = folder / "receipts" if (folder / "receipts").is_dir() else folder
    found = [_parse(path) for path in sorted(folder.glob("[0-9]*-*.json"))]
    runs = [receipt for receipt in found if isinstance(receipt, RunReceipt)]
    if len(runs) != 1:
        raise SnelloError(f"no receipts of a run in {folder}", "give the folder that `snello optimize` left")
    proofs = [receipt for receipt in found if isinstance(receipt, ProofReceipt)]
    steps = tuple(receipt for receipt in found if isinstance(receipt, StepReceipt))
    tasks = [receipt for receipt in found if isinstance(receipt, TaskReceipt)]
    return Receipts(run=runs[0], steps=steps, proof=proofs[-1] if proofs else None, task=tasks[-1] if tasks else None)


def _parse(path: Path) -> Receipt:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("schema", 0) > SCHEMA:
            raise SnelloError(f"{path.name} has schema {value['schema']}, this version reads {SCHEMA}", "update snello")
        return revive(_KINDS[value["kind"]], value)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError) as error:
        raise SnelloError(f"{path} is not a receipt: {error}", "run `snello optimize` again") from error
