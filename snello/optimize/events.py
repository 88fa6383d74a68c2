"""What `optimize` says while it works: one stream of typed events that every renderer reads.

The live terminal, the plain log, `--json`, a notebook and the receipts all render these and nothing else. An
event is a frozen dataclass of plain values; `to_json` gives one line with the event's name and the schema
number in it. Fields are only ever added. Quantities with uncertainty are `Interval`s: {"low", "mid", "high"}.
The last event is always `Finished`, also when the run was interrupted or could not prove anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from snello.measure.interval import Interval

SCHEMA = 1

Verdict: TypeAlias = Literal["kept", "dropped", "not run", "cannot tell"]
Goal: TypeAlias = Literal["latency", "throughput", "memory"]


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON holds: an unbounded number is the largest there is."""
    if isinstance(value, Result):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return str(value) if isinstance(value, Path) else value


class Event:
    """Base of all events; `name` is the class name in snake case unless an event says another."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None) -> None:
        cls.name = name or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def to_json(self) -> dict[str, Any]:
        return {"event": self.name, "schema": SCHEMA, **plain(self)}


@dataclass(frozen=True, kw_only=True)
class ModelLoaded(Event):
    """The original: `weights` is the number type its body is stored in ("bf16")."""

    model: str
    path: Path
    num_parameters: int
    weights: str
    weights_bytes: int
    digest: str
    resumed: bool = False  # a run that was stopped goes on
    task: str = "causal-lm"


@dataclass(frozen=True, kw_only=True)
class MachineProbed(Event):
    cpu: str
    cores: int
    threads: int
    isa: str
    memory_bytes: int
    bandwidth_gigabytes: float  # a second, read from memory by all threads
    possible_decode_tokens_per_second: float  # the original's ceiling
    possible_prefill_tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One `--text`, cut by document."""

    name: str
    documents: int
    calib_tokens: int
    select_tokens: int  # scored
    proof_tokens: int  # scored
    dropped_blocks: int  # blocks of select and proof that share a 13-gram with calib
    smallest_provable: float | None = None  # on the proof cut; 0.004 is 0.4%


@dataclass(frozen=True, kw_only=True)
class TextRead(Event):
    """`self_written`: there was no text, so the original wrote its own."""

    sources: tuple[TextSource, ...]
    self_written: bool
    smallest_provable: float  # the worst source's
    max_loss: float
    measure: str  # "loss", "accuracy points", "1 - cosine", "AUC points"


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """`predicted_speedup`: over the original, from ceilings and measured overhead. `runs`: False: cannot
    pay.
    """

    name: str
    steps: tuple[dict[str, Any], ...]  # {"use": "quantize", options...}
    predicted_speedup: float
    predicted_bytes: int
    predicted_seconds: float
    runs: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """`goal`: what the predicted and measured speed-ups are by."""

    stages: tuple[PlannedStage, ...]
    predicted_seconds: float
    time_budget_seconds: float
    memory_bytes: int  # predicted peak
    memory_available_bytes: int
    disk_bytes: int
    disk_available_bytes: int
    goal: Goal = "latency"


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """Also "original", "original again", "proof"; `index` counts from 0 and is the receipt's number."""

    index: int
    stage: str
    predicted_seconds: float


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """`done` of `total` units of what is under way; within one `activity` done never falls, total never
    grows.
    """

    stage: str
    activity: str  # "apply", "score quantize int8", "time latency over original"
    done: int
    total: int
    unit: str  # "layer", "window", "pair"
    used_seconds: float  # of the time budget


@dataclass(frozen=True, kw_only=True)
class LadderRow:
    """One row of the ladder: a stage, its loss (L, one-sided 95% bounds), its speed-up over the original.

    `kind` "original" and "again" are the baseline and its A/A; "fault" the planted fault; "stage" the rest.
    """

    index: int
    name: str
    kind: Literal["original", "again", "fault", "stage"]
    verdict: Verdict | Literal["original", "steady", "unsteady", "caught", "not caught"]
    reason: str
    loss: Interval | None = None  # cumulative, against the original
    increment: Interval | None = None  # against the best until then
    speedup: Interval | None = None  # by the goal, over the original
    gain: Interval | None = None  # by the goal, over the best until then
    weights_bytes: int | None = None
    replaces: str | None = None  # the stage whose place it took: by paying over it, or by losing less at equal cost
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageJudged(Event):
    row: LadderRow
    used_seconds: float
    time_budget_seconds: float
    best_speedup: float  # so far
    resumed: bool = False  # taken from the journal of a run that was stopped


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something that the reader should know and that stops nothing, said once."""

    message: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class ProofRead(Event):
    """The proof text was read, once. `tokens`: scored; of encoders, texts (`unit`)."""

    tokens: int
    loss: Interval
    top1_agreement: float | None
    proved: bool
    fault_caught: bool
    sentence: str
    unit: str = "tokens"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to. `path` is the lean folder, None where there is no artefact.

    Exit codes: 0 proved, also when nothing paid; 3 target missed or proof failed; 4 the text cannot prove the
    budget; 130 interrupted and resumable.
    """

    exit_code: int
    sentence: str
    reason: str = ""  # why there is no artefact, or what the exit code means
    path: Path | None = None
    receipts: Path | None = None
    report: Path | None = None
    recipe: Path | None = None
    speedup: Interval | None = None  # lean over our original, by the goal
    engine_speedup: Interval | None = None  # our original over Transformers; None: not measured
    size_ratio: float | None = None
    loss: Interval | None = None
    ladder: tuple[LadderRow, ...] = ()
    artifact_sha256: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Finished(Event, name="result"):
    """The last event of every run."""

    result: Result

    def to_json(self) -> dict[str, Any]:
        fields = self.result.to_json()
        return {"event": self.name, "schema": SCHEMA, "exit": fields.pop("exit_code"), **fields}
