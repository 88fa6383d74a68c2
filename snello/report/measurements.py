"""The second half of the report: what was measured, how, on what. One function a section."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from snello.measure.interval import Interval
from snello.optimize.receipts import CostRatio, Evidence, Perplexity, ProofReceipt, Receipts, RunReceipt, Speed
from snello.report import charts, numbers
from snello.report.blocks import Block, Command, Section, Table, Text
from snello.report.cells import both, optional, optional_percent, plain_number

# ---- 6: the front and the ablation ----------------------------------------------------------------------------------


def pareto(proof: ProofReceipt) -> Section:
    blocks: list[Block] = [charts.pareto(proof.pareto)] if proof.pareto else [Text("Fewer than two candidates.")]
    if proof.ablation:
        rows = tuple(
            (f"without {item.without}", numbers.times_interval(item.speedup), numbers.loss(item.loss), item.note or "-")
            for item in proof.ablation
        )
        columns = ("the final chain", "speed-up", "loss (at most)", "note")
        blocks.append(Table(columns=columns, rows=rows, right=(1, 2)))
    about = (
        "Each candidate by speed-up and by the upper bound of its loss. Candidates joined by a grey band cannot be "
        "told apart on this text and are not ranked. The second table takes one stage out of the final chain at a time."
    )
    return Section(key="pareto", title="Speed against loss", about=about, blocks=tuple(blocks))


# ---- 7: speed -------------------------------------------------------------------------------------------------------


def speed(run: RunReceipt, proof: ProofReceipt) -> Section:
    blocks: list[Block] = [Text(f"Workload: {run.workload}")]
    sides = (("original", proof.speed_original), ("lean", proof.speed_lean))
    rows = tuple(row for name, speed in sides if speed is not None for row in _speed_rows(name, speed))
    columns = ("what", "measured", "ceiling")
    if rows:
        blocks.append(Table(columns=columns, rows=rows, right=(1, 2)))
    blocks += [charts.pairs(cost) for cost in proof.costs if len(cost.pairs) > 1]
    if proof.costs:
        blocks.append(_costs(proof.costs))
    about = (
        "Tokens a second beside the most that this machine's measured bandwidth and arithmetic allow. The two models "
        "ran in turn (A B B A); a ratio is stated where the 95% half-width is at most 1.5%."
    )
    return Section(key="speed", title="Speed against the ceiling", about=about, blocks=tuple(blocks))


def _speed_rows(name: str, speed: Speed) -> list[tuple[str, str, str]]:
    rows = [
        (
            f"{name}: prompt, tokens a second",
            _range(speed.prefill_tokens_per_second),
            speed.ceiling_prefill_tokens_per_second,
        ),
        (
            f"{name}: answer, tokens a second",
            _range(speed.decode_tokens_per_second),
            speed.ceiling_decode_tokens_per_second,
        ),
    ]
    cells = [(what, measured, numbers.rate(ceiling)) for what, measured, ceiling in rows]
    cells.append((f"{name}: first token", numbers.seconds(speed.first_token_seconds), "-"))
    cells.append((f"{name}: whole answer", numbers.seconds(speed.latency_seconds), "-"))
    cells.append((f"{name}: bytes read a token", numbers.size(speed.bytes_per_token), "-"))
    if speed.throughput_tokens_per_second is not None:
        cells.append((f"{name}: all streams, tokens a second", numbers.rate(speed.throughput_tokens_per_second), "-"))
    if speed.peak_resident_bytes is not None:
        cells.append((f"{name}: peak memory", numbers.size(speed.peak_resident_bytes), "-"))
    return cells


def _range(interval: Interval) -> str:
    return f"{numbers.rate(interval.mid)} ({numbers.rate(interval.low)}-{numbers.rate(interval.high)})"


def _costs(costs: Iterable[CostRatio]) -> Table:
    rows = tuple((cost.goal, cost.against, _cost(cost), "yes" if cost.steady else "no") for cost in costs)
    return Table(columns=("cost", "against", "ratio (95%)", "steady"), rows=rows, right=(2,))


def _cost(cost: CostRatio) -> str:
    return f"{cost.ratio.mid:.3f} ({cost.ratio.low:.3f}-{cost.ratio.high:.3f})" if cost.steady else "too noisy to say"


# ---- 8: quality -----------------------------------------------------------------------------------------------------


def quality(proof: ProofReceipt) -> Section:
    blocks: list[Block] = []
    if proof.evidence is not None:
        blocks.append(_evidence(proof.evidence, proof.perplexity))
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
        "(dequantized, in the reference) rather than from integer activations and cache. Rates of looping and ending "
        "are of fixed prompts."
    )
    blocks = blocks or [Text("Nothing was proved, so there is nothing to show.")]
    return Section(key="quality", title="Where the loss sits", about=about, blocks=tuple(blocks))


def _evidence(evidence: Evidence, perplexity: Perplexity | None = None) -> Table:
    rows = [
        (
            source.source,
            numbers.loss(source.loss),
            f"{numbers.count(source.tokens)} in {numbers.count(source.blocks)} blocks",
        )
        for source in evidence.sources
    ]
    if perplexity is not None:
        found = f"{perplexity.original:.4f} and {perplexity.lean:.4f}"
        rows.append((f"perplexity on {perplexity.source}, original and lean", found, "recomputed by verify.py"))
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
    asked = (
        ("budget", f"at most {numbers.percent(run.max_loss)} {run.measure}"),
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
    blocks: list[Block] = [Table(columns=("asked", "value"), rows=asked), _texts(run)]
    blocks += [_machine(run.machine), _facts("version", run.versions)]
    if receipts.proof is not None and receipts.proof.files:
        blocks.append(_facts("file, SHA-256", receipts.proof.files))
    margins = tuple((step.stage, step.margin) for step in receipts.steps if step.margin)
    if margins:
        blocks.append(Table(columns=("decision", "how near it was"), rows=margins))
    blocks += [Text("The command of this run:"), Command(" ".join(run.command))]
    about = (
        "Texts are cut by document into calibration, selection and proof; blocks that share thirteen words in a row "
        "with the calibration cut are dropped. The proof cut is read once, at the end."
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
