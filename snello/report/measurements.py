"""The second half of the report: what was measured, how, on what. One function a section."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from snello.measure.bootstrap import DRAWS
from snello.measure.interval import Interval
from snello.measure.limits import exact
from snello.optimize.receipts import (
    Ablation,
    CostRatio,
    Duel,
    Evidence,
    ProofReceipt,
    Receipts,
    RunReceipt,
    SequenceSpeed,
    Speed,
)
from snello.report import charts, numbers
from snello.report.blocks import Block, Command, Section, Table, Text
from snello.report.cells import both, optional, optional_percent, plain_number

# ---- 5: the front and the ablation ----------------------------------------------------------------------------------


def pareto(run: RunReceipt, proof: ProofReceipt) -> Section:
    enough = len(proof.pareto) > 1
    blocks: list[Block] = [
        charts.pareto(proof.pareto, run.max_loss) if enough else Text("No candidate but the original was measured.")
    ]
    if proof.ablation:
        blocks.append(_ablation(proof.ablation))
    if proof.duels:
        blocks.append(_duels(proof.duels))
    about = (
        "Each candidate by speed-up and by the upper bound of its loss. Candidates joined by a grey band cannot be "
        "told apart on this text and are not ranked. The second table takes one part out of the final chain at a time: "
        "what is left over the original, then the whole chain over what is left. Parts interact, so shares need not "
        "add up to all. The third times the chain in turn beside the single steps that came near it."
    )
    return Section(key="pareto", title="Speed against loss", about=about, blocks=tuple(blocks))


def _ablation(items: Iterable[Ablation]) -> Table:
    """One row a part: the chain without it, then what it brings."""
    rows = tuple(
        (
            f"without {item.without}",
            numbers.times_interval(item.speedup),
            numbers.loss(item.loss),
            optional(item.gain, numbers.times_interval),
            optional_percent(item.speed_share),
            optional(item.added, numbers.loss),
            optional_percent(item.loss_share),
            item.note or "-",
        )
        for item in items
    )
    brings = ("it brings", "of the speed-up", "it costs (at most)", "of the loss")
    columns = ("the final chain", "speed-up", "loss (at most)", *brings, "note")
    return Table(columns=columns, rows=rows, right=(1, 2, 3, 4, 5, 6))


def _duels(items: Iterable[Duel]) -> Table:
    rows = tuple(
        (item.single, numbers.times_interval(item.gain), "-" if item.steady else "noisy: not known to 1.5%")
        for item in items
    )
    return Table(columns=("single step", "the final chain over it", "note"), rows=rows, right=(1,))


# ---- 6: speed -------------------------------------------------------------------------------------------------------


def speed(run: RunReceipt, proof: ProofReceipt) -> Section:
    blocks: list[Block] = [Text(f"Workload: {run.workload}")]
    sides = [(name, side) for name, side in (("original", proof.speed_original), ("lean", proof.speed_lean)) if side]
    if sides:
        blocks.append(_speeds(dict(sides)))
    if proof.sequences_original:
        blocks.append(_sequences(proof.sequences_original, proof.sequences_lean))
    if any(_beats_its_ceiling(side) for _, side in sides):
        blocks.append(
            Text(
                "A speed above its ceiling means that the machine was busy when it was probed: that ceiling is too "
                "low. On a quiet machine: snello doctor --refresh, then the command of this run again."
            )
        )
    blocks += [charts.pairs(cost) for cost in proof.costs if len(cost.pairs) > 1]
    if proof.costs:
        blocks.append(_costs(proof.costs))
    about = (
        "Tokens a second beside the most that this machine's measured bandwidth and arithmetic allow: the median, "
        "then the least and the most of the runs. The ratio is measured apart: the two models ran in turn (A B B A), "
        "until its 95% half-width was at most 1.5% of the original's cost (steady) or the tries were used up."
    )
    return Section(key="speed", title="Speed against the ceiling", about=about, blocks=tuple(blocks))


def _speeds(sides: Mapping[str, Speed]) -> Table:
    """One row a quantity; each model beside its own ceiling."""
    rows: list[tuple[str, Callable[[Speed], tuple[str, str]]]] = [
        (
            "prompt, tokens a second",
            lambda s: (_range(s.prefill_tokens_per_second), numbers.rate(s.ceiling_prefill_tokens_per_second)),
        ),
        (
            "answer, tokens a second",
            lambda s: (_range(s.decode_tokens_per_second), numbers.rate(s.ceiling_decode_tokens_per_second)),
        ),
        ("first token, median", lambda s: (numbers.seconds(s.first_token_seconds), "-")),
        ("whole answer, median", lambda s: (numbers.seconds(s.latency_seconds), "-")),
        ("bytes read a token", lambda s: (numbers.size(s.bytes_per_token), "-")),
        ("all streams, tokens a second", lambda s: (_optional(s.throughput_tokens_per_second, numbers.rate), "-")),
        ("peak memory", lambda s: (_optional(s.peak_resident_bytes, numbers.size), "-")),
    ]
    cells = [(name, *(cell for side in sides.values() for cell in write(side))) for name, write in rows]
    shown = tuple(row for row in cells if set(row[1:]) != {"-"})
    columns = ("what", *(name for side in sides for name in (side, "its ceiling")))
    return Table(columns=columns, rows=shown, right=tuple(range(1, len(columns))))


def _sequences(original: Sequence[SequenceSpeed], lean: Sequence[SequenceSpeed]) -> Table:
    """One row a length; each model beside its own ceiling."""
    sides = [side for side in (original, lean) if side]
    names = ("original", "lean")[: len(sides)]
    rows = tuple(
        (
            numbers.count(lengths[0].tokens),
            *(cell for one in lengths for cell in (_range(one.sequences_per_second), numbers.rate(one.ceiling))),
        )
        for lengths in zip(*sides, strict=True)
    )
    columns = ("sequences a second, of tokens", *(name for side in names for name in (side, "its ceiling")))
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))))


def _beats_its_ceiling(speed: Speed) -> bool:
    return (
        speed.prefill_tokens_per_second.mid > speed.ceiling_prefill_tokens_per_second
        or speed.decode_tokens_per_second.mid > speed.ceiling_decode_tokens_per_second
    )


def _optional(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _range(interval: Interval) -> str:
    return f"{numbers.rate(interval.mid)} ({numbers.rate(interval.low)}-{numbers.rate(interval.high)})"


def _costs(costs: Iterable[CostRatio]) -> Table:
    rows = tuple((cost.goal, cost.against, _cost(cost), "yes" if cost.steady else "no") for cost in costs)
    return Table(columns=("cost", "against", "ratio (95%)", "steady"), rows=rows, right=(2,))


def _cost(cost: CostRatio) -> str:
    return f"{cost.ratio.mid:.3f} ({cost.ratio.low:.3f}-{cost.ratio.high:.3f})" if cost.steady else "too noisy to say"


# ---- 7: quality -----------------------------------------------------------------------------------------------------


def quality(proof: ProofReceipt) -> Section:
    blocks: list[Block] = []
    if proof.evidence is not None:
        blocks.append(_evidence(proof.evidence))
        blocks.append(_guards(proof.evidence))
        if proof.evidence.guards.divergence_quantiles:
            blocks.append(charts.divergence(proof.evidence.guards.divergence_quantiles))
    if proof.documents:
        blocks.append(charts.documents(proof.documents))
    if proof.sharper is not None:
        blocks.append(
            Text(f"Pairing makes this interval {proof.sharper:.1f} times narrower than two separate runs would.")
        )
    about = (
        "Where the loss sits: by text, by document, by token, and how much of it comes from the weights alone "
        "(dequantized, in the reference) rather than from integer activations and cache. Divergence is read at a fixed "
        "sample of positions; rates of looping and ending are of fixed prompts."
    )
    blocks = blocks or [Text("Nothing was proved, so there is nothing to show.")]
    return Section(key="quality", title="Where the loss sits", about=about, blocks=tuple(blocks))


def _evidence(evidence: Evidence) -> Table:
    rows = [
        (
            source.source,
            numbers.loss(source.loss),
            f"{numbers.count(source.tokens)} in {numbers.count(source.blocks)} blocks",
        )
        for source in evidence.sources
    ]
    note = evidence.weights_only_note or "-"
    rows.append(("weights alone, in the reference", optional(evidence.weights_only, numbers.loss), note))
    if evidence.executor_on_same_part is not None:
        rows.append(("the executor on that same part", numbers.loss(evidence.executor_on_same_part), "-"))
    if evidence.metric is not None:
        rows.append(("your own score: how much worse", numbers.loss(evidence.metric), "-"))
    return Table(columns=(f"{evidence.measure} on", "loss (at most)", "tokens"), rows=tuple(rows), right=(1, 2))


def _guards(evidence: Evidence) -> Table:
    guards = evidence.guards
    rows = [
        ("mean KL(original || lean), nats", plain_number(guards.mean_divergence)),
        ("99th percentile of it", plain_number(guards.divergence_p99)),
        ("same most likely next token", optional_percent(guards.top1_agreement)),
        ("answers that loop: original, lean", both(guards.looping)),
        ("answers that end by themselves: original, lean", both(guards.ending)),
        ("prompts for these two", numbers.count(guards.prompts)),
        ("mean cosine to the original", plain_number(guards.mean_cosine)),
        ("nearest neighbours kept", optional_percent(guards.neighbours_kept)),
        ("guards that --strict would not pass", ", ".join(guards.failed) or "none"),
    ]
    rows = [row for row in rows if row[1] != "-"]
    return Table(columns=("guard", "value"), rows=tuple(rows), right=(1,))


# ---- 9: the method --------------------------------------------------------------------------------------------------


def method(receipts: Receipts) -> Section:
    run = receipts.run
    asked: tuple[tuple[str, str], ...] = (
        ("budget", f"at most {exact(run.max_loss)} {run.measure}"),
        ("goal", run.goal + (", strict" if run.strict else "")),
        ("time budget", numbers.clock(run.time_budget_seconds)),
        ("seed", str(run.seed)),
        ("smallest loss that the text can prove", numbers.percent(run.smallest_provable)),
        ("how that is known", run.power_rule),
        ("started", run.created),
        ("model", f"{run.model.name}, {numbers.parameters(run.model.num_parameters)}, {run.model.weights}"),
        (
            "original's weights",
            f"{numbers.size(run.model.weights_bytes)}, {run.model.bits_per_weight:.2f} bits a weight",
        ),
    )
    asked += (("target", f"{run.target:g}x"),) if run.target is not None else ()
    asked += (("target", numbers.size(run.target_bytes)),) if run.target_bytes is not None else ()
    asked += (("your own score", run.metric),) if run.metric is not None else ()
    blocks: list[Block] = [Table(columns=("asked", "value"), rows=asked), _texts(run)]
    blocks += [_machine(run.machine), _facts("version", run.versions)]
    margins = tuple((step.stage, step.margin) for step in receipts.steps if step.margin)
    if margins:
        blocks.append(Table(columns=("decision", "how near it was"), rows=margins))
    blocks += [Text("The command of this run:"), Command(shlex.join(run.command))]
    about = (
        "Texts are cut by document into calibration, selection and proof; blocks that share thirteen tokens in a row "
        "with the calibration cut are dropped. The proof cut is read once, at the end. Bounds come from redrawing "
        f"whole documents {numbers.count(DRAWS)} times; where a few documents are most of a cut, its windows (blocks) "
        "are redrawn instead. Those of right and wrong answers come from a score test (Tango, 1998)."
    )
    return Section(key="method", title="Method, machine, versions", about=about, blocks=tuple(blocks))


def _texts(run: RunReceipt) -> Table:
    rows = tuple(
        (
            source.name,
            numbers.count(source.documents),
            numbers.count(source.calib_tokens),
            numbers.count(source.select_tokens),
            numbers.count(source.proof_tokens),
            numbers.count(source.dropped_blocks),
        )
        for source in run.text
    )
    columns = ("text", "documents", "calibration", "selection", "proof (tokens)", "blocks dropped")
    return Table(columns=columns, rows=rows, right=(1, 2, 3, 4, 5))


def _machine(machine: Mapping[str, Any]) -> Table:
    """What was probed, in the units of the terminal; a fact that this version does not know is shown as it is."""
    shown: dict[str, Callable[[Any], str]] = {
        "memory_bytes": numbers.size,
        "measured_at": lambda at: datetime.fromtimestamp(at, UTC).isoformat(timespec="minutes"),
        "bandwidth": lambda points: ", ".join(
            f"{numbers.size(size)}: {speed / 1e9:.1f} GB/s" for size, speed in points
        ),
        "compute": lambda peaks: ", ".join(f"{name}: {speed / 1e9:,.0f} GOP/s" for name, speed in peaks.items()),
    }
    names = {"memory_bytes": "memory", "measured_at": "measured", "bandwidth": "reading a working set of"}
    rows = tuple((names.get(key, key), shown.get(key, _fact)(value)) for key, value in machine.items())
    return Table(columns=("machine", "value"), rows=rows)


def _facts(name: str, facts: Mapping[str, object]) -> Table:
    return Table(columns=(name, "value"), rows=tuple((key, _fact(value)) for key, value in facts.items()))


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value)
    return str(value)
