"""Receipts arranged in the order in which a sceptic asks: the claim, the worst, the ladder, the controls, the check.

One function a section. Nothing is measured or derived here; a number that a run could not give is named with its
reason.
"""

from __future__ import annotations

import json

from snello.optimize.events import LadderRow
from snello.optimize.receipts import Evidence, Passage, ProofReceipt, Receipts, RunReceipt, TaskGain, TaskReceipt
from snello.report import charts, numbers
from snello.report.blocks import Block, Command, Excerpt, Items, Page, Section, Table, Text
from snello.report.cells import optional
from snello.report.measurements import method, pareto, quality, speed

NATS_PER_STEP = 1.0  # an underline of a token grows by one step per this much loss
NATS_WORTH_SHADING = 0.25  # a token that lost more than this is shaded
NOT_SHOWN = (
    "Other kinds of text than this: a language, a domain or a style that the proof text does not hold.",
    "Contexts longer than the windows of the proof (at most 1,024 tokens).",
    "Other machines: every speed is this machine's, with this number of threads.",
    "Taste: a loss per token says how surprised the model is by your text, not which answer you prefer. Within "
    "the budget candidates are equal here and are chosen by speed; give --metric to judge them by your own score.",
)


def page(receipts: Receipts) -> Page:
    """All sections of one run."""
    run, proof = receipts.run, receipts.proof
    sections = [_claim(run, proof)]
    if receipts.task is not None:
        sections.append(_task(receipts.task))
    if proof is not None:
        sections.append(_worst(proof))
    sections += [_ladder(receipts), _controls(receipts)]
    if proof is not None:
        sections += [pareto(run, proof), speed(run, proof), quality(proof)]
    sections += [_check(run, proof), method(receipts)]
    outcome = "made lean" if proof is not None and proof.artifact_sha256 else "left as it is"
    return Page(title=f"{run.model.name}, {outcome}", sections=tuple(sections))


def ladder_rows(receipts: Receipts) -> tuple[LadderRow, ...]:
    """The proof's ladder; of a run that ended before it, the rows that were judged."""
    if receipts.proof is not None:
        return receipts.proof.ladder
    return tuple({step.stage: step.row for step in receipts.steps}.values())


# ---- 1: the claim ---------------------------------------------------------------------------------------------------


def _claim(run: RunReceipt, proof: ProofReceipt | None) -> Section:
    blocks: list[Block] = []
    if proof is None:
        blocks.append(Text("This run ended before its proof: nothing is claimed."))
    else:
        blocks.append(Text(proof.sentence))
        if proof.reason not in ("", proof.sentence):
            blocks.append(Text(proof.reason))
        blocks.append(_two_speeds(proof))
    own = ("Your text: none was given, so the original wrote the text that it was judged on.",)
    blocks += [Text("What this does not show:"), Items((own if run.self_written else ()) + NOT_SHOWN)]
    about = (
        "The sentence holds for this text and this machine. The loss is an upper bound at 95% from paired "
        "differences on text that nothing was chosen on. The two speed-ups have different causes and are never "
        "multiplied. What is not shown is not known to be bad; it is not known."
    )
    return Section(key="claim", title="What is claimed", about=about, blocks=tuple(blocks))


def _two_speeds(proof: ProofReceipt) -> Table:
    engine = proof.engine_note or "not measured"
    rows = [
        ("techniques: lean over our original", optional(proof.speedup, numbers.times_interval)),
        (
            "engine: our original over Transformers",
            engine if proof.engine_speedup is None else numbers.times_interval(proof.engine_speedup),
        ),
        ("size: original over lean", "-" if proof.size_ratio is None else numbers.times(proof.size_ratio)),
    ]
    return Table(columns=("ratio", "value (95%)"), rows=tuple(rows), right=(1,))


def _task(task: TaskReceipt) -> Section:
    """What the task gained, in full precision and lean."""
    rows = (
        ("adapted, over its base", *_gain(task, task.full)),
        ("lean, over the base made lean alike", *_gain(task, task.lean)),
    )
    table = Table(columns=("model", task.measure, "gain (95%)"), rows=rows, right=(1, 2))
    about = (
        f"The original of this page is a model that was adapted to a task, in full precision. Both rows were judged "
        f"on {numbers.count(task.held_out)} held-out examples of {numbers.count(task.families)} families that no "
        "training saw, paired by example and redrawn by family. The first row is the reference's, the second the "
        "executor's that serves; the base was made lean by the same steps, calibrated on the training examples."
    )
    return Section(key="task", title="The task", about=about, blocks=(table,))


def _gain(task: TaskReceipt, gain: TaskGain) -> tuple[str, str]:
    return f"{gain.before:.3f} -> {gain.after:.3f}", numbers.task_gain(task.measure, gain.gain)


# ---- 2: the worst passages ------------------------------------------------------------------------------------------


def _worst(proof: ProofReceipt) -> Section:
    blocks: list[Block] = [_excerpt(place, passage) for place, passage in enumerate(proof.worst[:10], 1)]
    about = (
        "The passages of the proof text where the lean model lost most, as each model read them. If these read fine to "
        "you, the rest does. They are the extremes of many passages, so they look worse than the text as a whole."
    )
    legend = Text(
        "The text is yours, the same on both sides. The thicker the line under a token, the more it surprised that "
        f"model; shaded: the lean model lost over {NATS_WORTH_SHADING:g} nats more there than the original."
    )
    nothing = Text("No passages were kept: there is no lean model, it predicts no words, or nothing was lost.")
    found = (legend, *blocks) if blocks else (nothing,)
    return Section(key="worst", title="The worst passages", about=about, blocks=found)


def _excerpt(place: int, passage: Passage) -> Excerpt:
    where = f"{passage.document} in {passage.source}, from token {numbers.count(passage.start)}"
    caption = f"{place}. {where}: {passage.difference:+.2f} nats over {numbers.count(len(passage.tokens))} tokens"
    return Excerpt(
        caption=caption,
        peaks=_peaks(passage),
        tokens=passage.tokens,
        original=tuple(map(_thickness, passage.original)),
        lean=tuple(map(_thickness, passage.lean)),
        lost=tuple(b - a > NATS_WORTH_SHADING for a, b in zip(passage.original, passage.lean, strict=True)),
    )


def _peaks(passage: Passage) -> str:
    """'Most at " Levy" (2.10, then 3.40), ...': the three tokens that lost most."""
    triples = zip(passage.tokens, passage.original, passage.lean, strict=True)
    worst = sorted(triples, key=lambda item: item[1] - item[2])[:3]
    return "Most at " + ", ".join(
        f"{json.dumps(token, ensure_ascii=False)} ({original:.2f}, then {lean:.2f})" for token, original, lean in worst
    )


def _thickness(nats: float) -> int:
    return max(0, min(5, int(nats / NATS_PER_STEP)))


# ---- 3: the ladder --------------------------------------------------------------------------------------------------


def _ladder(receipts: Receipts) -> Section:
    rows = ladder_rows(receipts)
    cells = tuple(_ladder_row(row) for row in rows)
    gain = f"{receipts.run.goal} gain (95%)"
    columns = ("stage", "verdict", "loss (at most)", "added (at most)", gain, "over the best", "weights")
    blocks = (charts.ladder(rows, receipts.run.max_loss), Table(columns=columns, rows=cells, right=(2, 3, 4, 5, 6)))
    about = (
        "Every stage in the order of judging, dropped and not-run ones included. Losses are cumulative against the "
        "original, on the selection text: the estimate, then its one-sided 95% bound; 'added' is against the best "
        "until then. A gain is the original's cost over the stage's; 'over the best' divides by the best until then, "
        "and is not timed for a stage of the same formats, which costs the same. A stage is kept if its bound is "
        "within the budget and it pays, or loses measurably less at the same cost. In the drawing a square is the "
        "instrument (A/A, planted fault), a dot kept, a cross dropped, a triangle cannot tell."
    )
    return Section(key="ladder", title="The ladder", about=about, blocks=blocks)


def _ladder_row(row: LadderRow) -> tuple[str, ...]:
    return (
        row.name,
        verdict(row),
        optional(row.loss, numbers.loss),
        optional(row.increment, numbers.loss),
        optional(row.speedup, numbers.times_interval),
        optional(row.gain, numbers.times_interval),
        "-" if row.weights_bytes is None else numbers.size(row.weights_bytes),
    )


def verdict(row: LadderRow) -> str:
    """ "dropped: over 1%", "kept, replaces int8"."""
    text = row.verdict + (f": {row.reason}" if row.reason else "")
    return f"{text}, replaces {row.replaces}" if row.replaces else text


# ---- 4: controls ----------------------------------------------------------------------------------------------------


def _controls(receipts: Receipts) -> Section:
    rows: list[tuple[str, str, str]] = []
    for step in receipts.steps:
        if step.row.kind in ("again", "fault"):
            name = f"{step.row.name}, on the selection text"
            rows.append((name, optional(step.row.loss, numbers.loss), verdict(step.row)))
        if step.evidence is not None:
            rows += _trained(step.evidence, f"{step.stage}, on the selection text")
    proof = receipts.proof
    if proof is not None and proof.evidence is not None:
        caught = {True: "caught", False: "not caught", None: "not measured"}[proof.fault_caught]
        rows.append(("the original against itself, on the proof", optional(proof.again, numbers.loss), "A/A"))
        rows.append(
            ("a planted fault just above the budget, on the proof", optional(proof.fault, numbers.loss), caught)
        )
        rows += _trained(proof.evidence, "on the proof")
    rows.append(("do nothing: keep the original", "0.00%", "always possible"))
    for missing in () if proof is None else proof.not_measured:
        name, _, reason = missing.partition(": ")
        rows.append((name, "-", f"not measured: {reason}"))
    about = (
        "An instrument that cannot fail proves nothing. The original measured twice must show no difference; a small "
        "damage planted on purpose must be found. A stage that trains is compared with the original trained alike, if "
        "that reads better. 'Do nothing' is the alternative that every stage has to beat."
    )
    table = Table(columns=("control", "loss (at most)", "outcome"), rows=tuple(rows), right=(1,))
    return Section(key="controls", title="Controls", about=about, blocks=(table,))


def _trained(evidence: Evidence, where: str) -> list[tuple[str, str, str]]:
    """What the same training gives the original, and whom the stage that trains was compared with."""
    return [
        (f"the {one.name}: {where}", numbers.loss(one.loss), f"the loss is taken against: {evidence.against}")
        for one in evidence.controls
    ]


# ---- 8: the check ---------------------------------------------------------------------------------------------------


def _check(run: RunReceipt, proof: ProofReceipt | None) -> Section:
    blocks: list[Block] = []
    about = "A replay gives the same bytes of the lean model; its timings are its own."
    if proof is not None and proof.perplexity is not None and proof.artifact_sha256:
        found = proof.perplexity
        blocks += [
            Text("In this folder, with Transformers alone; ORIGINAL is the model that you started from:"),
            Command("snello export . --to hf -o hf\npython verify.py ORIGINAL hf"),
            Table(
                columns=("perplexity to be found", found.source),
                rows=(("original", f"{found.original:.4f}"), ("lean, as it runs here", f"{found.lean:.4f}")),
                right=(1,),
            ),
        ]
        about += (
            " verify.py reads the token windows of proof.json and scores both models in plain numbers, so it sees the "
            "lean weights without integer activations: its loss lies within the bound, not on the digit."
        )
    blocks += [Text("The same model anew, from the recorded decisions:"), Command((proof or run).replay)]
    digests = [("the original's shapes and weights", run.model.digest), ("the text", run.text_sha256)]
    if proof is not None:
        digests += proof.files.items()
    blocks.append(Table(columns=("what", "SHA-256"), rows=tuple(digests)))
    return Section(key="check", title="Check it yourself", about=about, blocks=tuple(blocks))
